"""Rotary position embedding of queries and keys, one pass over both, forward and backward.

    y = x ⊙ cos + R x ⊙ sin,   R (x₁, x₂) = (−x₂, x₁) for the halves x₁, x₂ of a head,
    ∂L/∂x = ∂L/∂y ⊙ cos + Rᵀ (∂L/∂y ⊙ sin)

(Su et al., arXiv 2104.09864, in the layout of halves that transformers uses.) Separate operations
negate, join, multiply and add: they read and write queries and keys 24 times, this 4 times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, by_triton

__all__ = ["rotary", "rotary_reference", "unfit"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by their positions; differentiable in q and k.

    Args:
        q: (B, H, T, D), k: (B, H', T, D); bfloat16, float16 or float32, D even. Any strides; a
            transposed (B, T, H, D) is not copied, one whose last stride is not 1 is.
        cos, sin: (B, T, D) or (1, T, D), of q's dtype, on its device. They get no gradient.

    Returns:
        Both turned, of their shapes, dtypes and (where they are dense) strides. Computed in
        float32 and rounded where separate operations round: each product, then the sum. Kept for
        the backward: cos and sin. Nothing is mutated; deterministic. On a GPU from compute
        capability 8.0 on a Triton kernel, where Triton is installed, and otherwise plain torch; the
        results are bitwise the same.

    Raises:
        TypeError: a dtype that is not listed above, or different ones.
        ValueError: shapes or devices that do not fit.
    """
    wrong = unfit(q, k, cos, sin)
    if wrong is not None:
        raise wrong
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return turned


def unfit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> TypeError | ValueError | None:
    """The error that :func:`rotary` raises for them; None where they fit."""
    dtypes = [t.dtype for t in (q, k, cos, sin)]
    if dtypes[0] not in _DTYPES or len(set(dtypes)) > 1:
        return TypeError(
            f"q, k, cos, sin are {', '.join(map(str, dtypes))}; expected the same one of "
            f"{', '.join(map(str, _DTYPES))}"
        )
    shapes = [tuple(t.shape) for t in (q, k, cos, sin)]
    fit = (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[::2] == k.shape[::2]
        and q.shape[3] == k.shape[3] == cos.shape[2]
        and q.shape[3] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[1] == q.shape[2]
        and cos.shape[0] in (1, q.shape[0])
    )
    if not fit:
        return ValueError(
            f"q, k, cos, sin have shapes {', '.join(map(str, shapes))}; expected (B, H, T, D), "
            "(B, H', T, D) and twice (B, T, D) or (1, T, D), with D even"
        )
    devices = {t.device for t in (q, k, cos, sin)}
    if len(devices) > 1:
        return ValueError(
            f"q, k, cos, sin are on {', '.join(sorted(map(str, devices)))}; expected one device"
        )
    return None


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x turned, or with ``back`` the gradient of x from that of x turned; in plain torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if back:
        first, second = (x * sin).chunk(2, -1)
        return x * cos + torch.cat((second, -first), -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    return rotary_reference(q, cos, sin, back=back), rotary_reference(k, cos, sin, back=back)


_TURN = Operation(
    by_triton("filet_kernels.elementwise.rotary_triton", "rotary_triton"),
    Backend("reference", _both),
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turned: tuple[Tensor, Tensor] = _TURN.choose(None, q).run(q, k, cos, sin)
        return turned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_TURN.choose(None, dq).run(dq, dk, cos, sin, back=True), None, None
