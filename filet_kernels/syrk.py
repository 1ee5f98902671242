"""Second moments: C += alpha Xᵀ diag(w) X, lower triangle, in place.

This is the accumulation step of S_X = E[x xᵀ] and S_Y = E[g gᵀ] (FILet, arXiv 2605.01046,
Algorithm 1); the division by the token count happens once, in :mod:`filet_kernels.energy`.

Three implementations: the CUDA kernels of csrc/syrk_*_sm90.cu, the Triton kernel of
:mod:`filet_kernels.syrk_triton`, and plain torch. The first that supports the operands is used.
docs/kernels.md has the measurements.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from filet_kernels.dispatch import (
    Backend,
    Operation,
    capability,
    define,
    has_tma_rows,
    mutated,
    on,
    why_no_triton,
)
from filet_kernels.extension import cuda_extension, stream_of, why_no_extension

__all__ = ["BACKENDS", "backend_of", "syrk_", "syrk_ragged_", "syrk_reference", "turns_on"]

_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Rows of C per step of the reference. It bounds the temporary that the diagonal block needs
# (block² elements) and keeps the work at half of the full product once n is a few blocks wide.
_BLOCK = 512

# Tokens of one launch. The tensor cores cut off what they add below the last bit of the sum, which
# then falls short by up to T / 16 · 2⁻²⁴ of itself: 6e-5 for this many (measured on an H200, as for
# the library's product), after which the sum goes on in C, rounded.
_TOKENS_A_SUM = 16384


def syrk_reference(C: Tensor, X: Tensor, alpha: float, weights: Tensor | None) -> None:
    """C += alpha Xᵀ diag(w) X on and below the diagonal, in C's dtype, block row by block row."""
    n = X.shape[1]
    rows = X.to(C.dtype)
    if weights is None:
        weighted = rows
    else:
        # A product with 0 would keep NaN: rows of weight 0 are replaced, not multiplied.
        counted = (weights != 0).unsqueeze(1)
        rows = torch.where(counted, rows, 0)
        weighted = rows * weights.to(C.dtype).unsqueeze(1)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        left = weighted[:, start:stop].T
        C[start:stop, :start].addmm_(left, rows[:, :start], alpha=alpha)
        C[start:stop, start:stop].add_(torch.tril(left @ rows[:, start:stop]), alpha=alpha)


def _reference(
    C: Tensor, X: Tensor, alpha: float, weights: Tensor | None, deterministic: bool
) -> None:
    with torch.autocast(X.device.type, enabled=False):  # it would round the products' operands
        syrk_reference(C, X, alpha, weights)


def _triton_unsupported(C: Tensor, X: Tensor, weights: Tensor | None) -> str | None:
    wrong = None if C.dtype == torch.float32 else f"C is {C.dtype}; expected torch.float32"
    return why_no_triton("X", X.device) or wrong


def _triton(
    C: Tensor, X: Tensor, alpha: float, weights: Tensor | None, deterministic: bool
) -> None:
    from filet_kernels.syrk_triton import syrk_triton

    with on(X.device):
        syrk_triton(C, X, alpha, weights, turns_on(X.device) if deterministic else None)


def _cuda_unsupported(C: Tensor, X: Tensor, weights: Tensor | None) -> str | None:
    if not X.is_cuda:
        return f"X is on {X.device}; expected a CUDA device"
    if capability(X.device) != (9, 0):
        return "it needs compute capability 9.0"
    if X.dtype not in (torch.bfloat16, torch.float16) or C.dtype != torch.float32:
        return f"X is {X.dtype}, C is {C.dtype}; expected bfloat16 or float16, and float32"
    if weights is not None:
        return "it takes no weights"
    if X.shape[1] < 128:
        return f"n={X.shape[1]}; expected 128, the width of a tile, or more"
    for name, tensor in (("X", X), ("C", C)):
        if not has_tma_rows(tensor):
            return (
                f"{name} has strides {tensor.stride()}; expected contiguous rows of 16-byte "
                "alignment that do not overlap"
            )
    return why_no_extension()


@functools.cache
def _plan(device: torch.device, n: int) -> Any:
    """Which CUDA kernel suits an n-wide C there, and its size: a ``SyrkPlan`` of the extension."""
    return cuda_extension().syrk_sm90_plan(n)


def _cuda(C: Tensor, X: Tensor, alpha: float, weights: Tensor | None, deterministic: bool) -> None:
    tokens, n = X.shape
    with on(X.device):
        cuda_extension().syrk_sm90(
            c=C.data_ptr(),
            stride_c=C.stride(0),
            x=X.data_ptr(),
            stride_x=X.stride(0),
            n=n,
            tokens=tokens,
            alpha=alpha,
            half=X.dtype == torch.float16,
            plan=_plan(X.device, n),
            flags=turns_on(X.device).data_ptr() if deterministic else 0,
            stream=stream_of(X.device),
        )


_kept_turns: dict[tuple[torch.device, int], Tensor] = {}


def turns_on(device: torch.device) -> Tensor:
    """Zeros by which the parts of a tile take turns; every kernel leaves them zero.

    One set a stream, on which kernels follow each other. A graph gets its own, in its memory: it
    may be replayed on any stream.
    """
    if device.type != "cuda":
        return torch.zeros(64, dtype=torch.int32, device="cpu")
    key = (device, stream_of(device))
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and key in _kept_turns:
        return _kept_turns[key]
    size = 4 * (torch.cuda.get_device_properties(device).multi_processor_count + 2)
    turns = torch.zeros(size, dtype=torch.int32, device=device)
    if not capturing:
        _kept_turns[key] = turns
    return turns


_SYRK = Operation(
    Backend("cuda", _cuda, _cuda_unsupported),
    Backend("triton", _triton, _triton_unsupported),
    Backend("reference", _reference),
)
BACKENDS = _SYRK.names


def backend_of(C: Tensor, X: Tensor, weights: Tensor | None = None) -> str:
    """The implementation that :func:`syrk_` uses for such operands: one of :data:`BACKENDS`."""
    return _SYRK.choose(None, C, X, weights).name


def syrk_(
    C: Tensor,
    X: Tensor,
    *,
    alpha: float = 1.0,
    weights: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Accumulate a second moment in place: C += alpha Σ_t w_t x_t x_tᵀ (lower triangle only).

    Args:
        C: (n, n), float32 (float64 allowed, and required where X is float64). Mutated on and below
            the diagonal; what lies above it is neither read nor written. Any strides.
        X: (T, n) or (B, T, n), bfloat16, float16, float32 or float64, any strides; one row a token.
            T = 0 leaves C as it is.
        alpha: factor of the whole sum (the loss scale's inverse square, say).
        weights: (T,) or (B, T), bool, integer or floating; None counts every row once. Rows of
            weight 0 never enter, so NaN there does no harm. A bool mask costs least.
        deterministic: add the parts of a sum that is split over the tokens in a fixed order. False
            lets them add as they come: docs/kernels.md has the times of both.
        backend: one of :data:`BACKENDS`, or None for the first that supports the operands.

    Returns:
        C.

    Accumulates in C's dtype: products of bfloat16 or float16 inputs are exact in float32, float32
    inputs and weighted rows enter as sums of bfloat16 that carry 24 bits. The CUDA and Triton
    kernels add to C by float32 atomics, which flush results below 1.2e-38 to zero. Unnormalised:
    divide by the token count afterwards. The same on every run for the same inputs, backend and
    GPU model. Allocates nothing of C's or X's size, does not synchronise with the host, and can be
    captured in a CUDA graph. Traced by torch.compile as ``torch.ops.filet_kernels.syrk_``.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes or devices that do not fit together, or a backend that does not support
            the operands.
        RuntimeError: the driver refused the launch; C is unchanged.
    """
    _check(C, X, weights)
    _SYRK.check(backend)
    if X.dim() == 3 and X.stride(0) == X.stride(1) * X.shape[1]:
        X = X.flatten(0, 1)
        weights = None if weights is None else weights.flatten()
    batches = [(X, weights)] if X.dim() == 2 else list(_unbatched(X, weights))
    for rows, counted in batches:
        torch.ops.filet_kernels.syrk_(C, rows, alpha, counted, deterministic, backend)
    return C


def _unbatched(X: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for index, rows in enumerate(X.unbind(0)):
        yield rows, None if weights is None else weights[index]


def _check(C: Tensor, X: Tensor, weights: Tensor | None) -> None:
    if X.dtype not in _INPUT_DTYPES:
        raise TypeError(f"X is {X.dtype}; expected one of {', '.join(map(str, _INPUT_DTYPES))}")
    if C.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"C is {C.dtype}; expected torch.float32 or torch.float64")
    if X.dtype == torch.float64 and C.dtype != torch.float64:
        raise TypeError("X is torch.float64 but C is torch.float32; expected a float64 C")
    if X.dim() not in (2, 3):
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (T, n) or (B, T, n)")
    n = X.shape[-1]
    if C.shape != (n, n):
        raise ValueError(f"C has shape {tuple(C.shape)}; expected ({n}, {n}) for the n={n} of X")
    if C.device != X.device:
        raise ValueError(f"C is on {C.device} but X is on {X.device}; expected the same device")
    if weights is not None:
        if weights.shape != X.shape[:-1]:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; expected {tuple(X.shape[:-1])}, "
                "one weight a row of X"
            )
        if weights.device != X.device:
            raise ValueError(f"weights is on {weights.device}; expected {X.device}, as X")
        if weights.is_complex():
            raise TypeError(f"weights is {weights.dtype}; expected bool, integer or floating")


def _syrk_op(
    C: Tensor,
    X: Tensor,
    alpha: float,
    weights: Tensor | None,
    deterministic: bool = True,
    backend: str | None = None,
) -> None:
    chosen = _SYRK.choose(backend, C, X, weights)
    if X.numel():
        for start in range(0, X.shape[0], _TOKENS_A_SUM):
            part = slice(start, start + _TOKENS_A_SUM)
            counted = None if weights is None else weights[part]
            chosen.run(C, X[part], alpha, counted, deterministic)
        mutated(C)


def syrk_ragged_(
    C: Tensor, X: Tensor, offsets: Tensor, *, alpha: float = 1.0, backend: str | None = None
) -> Tensor:
    """Second moments of groups of rows in one launch: C[e] += alpha Σ_{t in group e} x_t x_tᵀ.

    For the experts of a mixture: tokens sorted by expert, group e being the rows
    offsets[e] ... offsets[e + 1] of X. Modules that share a shape are the same with their rows
    one after another.

    Args:
        C: (E, n, n) float32 (or float64, for any X). Mutated on and below each diagonal only.
        X: (T, n), bfloat16, float16, float32 or float64; any strides.
        offsets: (E + 1,) int32 or int64, on X's device, not decreasing, within 0 ... T. Its values
            are not checked: that would wait for the device. Groups may be empty.
        alpha: factor of the whole sum.
        backend: "triton" or "reference" (which reads the offsets on the host), or None for Triton
            on a GPU and plain torch elsewhere.

    Returns:
        C. Precision and determinism as :func:`syrk_`.

    Raises:
        TypeError, ValueError: operands that do not fit, naming the argument.
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend={backend!r}; expected None, 'triton' or 'reference'")
    if C.dim() != 3:
        raise ValueError(f"C has shape {tuple(C.shape)}; expected (E, n, n)")
    if X.dim() != 2:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (T, n)")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets is {offsets.dtype}; expected torch.int32 or torch.int64")
    if offsets.shape != (C.shape[0] + 1,):
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; expected ({C.shape[0] + 1},), one more "
            "than the matrices of C"
        )
    if offsets.device != X.device:
        raise ValueError(f"offsets is on {offsets.device}; expected {X.device}, as X")
    if C.shape[0]:
        _check(C[0], X, None)
    torch.ops.filet_kernels.syrk_ragged_(C, X, offsets, alpha, backend)
    return C


def _ragged_triton(C: Tensor, X: Tensor, offsets: Tensor, alpha: float) -> None:
    from filet_kernels.syrk_triton import syrk_ragged_triton

    with on(X.device):
        syrk_ragged_triton(C, X, offsets, alpha, turns_on(X.device), _TOKENS_A_SUM)


def _ragged_reference(C: Tensor, X: Tensor, offsets: Tensor, alpha: float) -> None:
    for group, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        _reference(C[group], X[begin:end], alpha, None, True)


_RAGGED = Operation(
    Backend("triton", _ragged_triton, _triton_unsupported),
    Backend("reference", _ragged_reference),
)


def _ragged_op(
    C: Tensor, X: Tensor, offsets: Tensor, alpha: float, backend: str | None = None
) -> None:
    if not C.numel() or not X.numel():
        return
    _RAGGED.choose(backend, C, X, None).run(C, X, offsets, alpha)
    mutated(C)


define(
    "syrk_(Tensor(a!) C, Tensor X, float alpha, Tensor? weights, bool deterministic=True, "
    "str? backend=None) -> ()",
    _syrk_op,
    lambda *args, **kwargs: None,
)
define(
    "syrk_ragged_(Tensor(a!) C, Tensor X, Tensor offsets, float alpha, str? backend=None) -> ()",
    _ragged_op,
    lambda *args, **kwargs: None,
)
