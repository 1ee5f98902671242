"""Second moments: C += alpha Xᵀ diag(w) X, lower triangle, in place.

This is the accumulation step of S_X = E[x xᵀ] and S_Y = E[g gᵀ] (FILet, arXiv 2605.01046,
Algorithm 1); the division by the token count happens once, in :mod:`filet_kernels.energy`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["syrk_", "syrk_reference"]

_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Rows of C per step of the reference. It bounds the temporary that the diagonal block needs
# (block² elements) and keeps the work at half of the full product once n is a few blocks wide.
_BLOCK = 512


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


def syrk_(C: Tensor, X: Tensor, *, alpha: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Accumulate a second moment in place: C += alpha Σ_t w_t x_t x_tᵀ (lower triangle only).

    Args:
        C: (n, n), float32 (float64 allowed, and required where X is float64). Mutated on and below
            the diagonal; what lies above it is neither read nor written. Any strides.
        X: (T, n) or (B, T, n), bfloat16, float16, float32 or float64, any strides; one row a token.
            T = 0 leaves C as it is.
        alpha: factor of the whole sum (the loss scale's inverse square, say).
        weights: (T,) or (B, T), bool, integer or floating; None counts every row once. Rows of
            weight 0 never enter, so NaN there does no harm.

    Returns:
        C.

    Accumulates in C's dtype: products of bfloat16 or float16 inputs are exact in float32.
    Unnormalised: divide by the token count afterwards. Deterministic for the same inputs on the
    same device. Traced by torch.compile as ``torch.ops.filet_kernels.syrk_``.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes or devices that do not fit together.
    """
    _check(C, X, weights)
    if X.dim() == 3 and X.stride(0) == X.stride(1) * X.shape[1]:
        X = X.flatten(0, 1)
        weights = None if weights is None else weights.flatten()
    if X.dim() == 2:
        torch.ops.filet_kernels.syrk_(C, X, alpha, weights)
    else:
        for index, rows in enumerate(X.unbind(0)):
            torch.ops.filet_kernels.syrk_(
                C, rows, alpha, None if weights is None else weights[index]
            )
    return C


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


@torch.library.custom_op("filet_kernels::syrk_", mutates_args={"C"})
def _syrk_op(C: Tensor, X: Tensor, alpha: float, weights: Tensor | None) -> None:
    with torch.autocast(X.device.type, enabled=False):  # it would round the products' operands
        syrk_reference(C, X, alpha, weights)


@_syrk_op.register_fake
def _syrk_fake(C: Tensor, X: Tensor, alpha: float, weights: Tensor | None) -> None:
    return None
