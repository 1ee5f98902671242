"""Quadratic forms: diag(Vᵀ S V) from the lower triangle of a symmetric S.

With v a column of V and S split into blocks,
    vᵀ S v = Σ_I v_Iᵀ S_II v_I + 2 Σ_{I>J} v_Iᵀ S_IJ v_J,
so only the lower triangle is read and half of the products are done. FILet's energies
(arXiv 2605.01046, Algorithm 1) are such diagonals.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Precision", "quadform_diag", "quadform_diag_reference"]

Precision = Literal["accurate", "fast"]

_S_DTYPES = (torch.float32, torch.float64)
_V_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Rows of S per step of the reference: its temporaries are (block, n) and (block, p).
_BLOCK = 512


def quadform_diag_reference(S: Tensor, V: Tensor, precision: str) -> Tensor:
    """diag(Vᵀ S V), (p,) float64: block rows of the lower triangle against V."""
    if precision == "fast":
        # bfloat16 operands have exact float32 products; only their sum is rounded.
        operand, compute = torch.bfloat16, torch.float32
    else:
        # FILet looks for directions in which vᵀSv cancels: float64 leaves the error of S alone.
        operand, compute = torch.float64, torch.float64
    n, p = V.shape
    V = V.to(operand).to(compute)
    total = torch.zeros(p, dtype=torch.float64, device=V.device)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        rows = S[start:stop, :stop].to(operand).to(compute)
        below, diagonal = rows[:, :start], torch.tril(rows[:, start:])
        diagonal = diagonal + torch.tril(diagonal, -1).T
        product = 2 * (below @ V[:start]) + diagonal @ V[start:stop]
        total += (V[start:stop] * product).sum(0, dtype=torch.float64)
    return total


def quadform_diag(S: Tensor, V: Tensor, *, precision: Precision = "accurate") -> Tensor:
    """Diagonal of a quadratic form: q_i = v_iᵀ S v_i for every column v_i of V.

    Args:
        S: (n, n), float32 or float64, symmetric; only the lower triangle is read. Any strides.
        V: (n, p), bfloat16, float16, float32 or float64. Any strides. p = 0 gives an empty result.
        precision: "accurate" computes in float64 (the only error left is that of S and V);
            "fast" rounds S and V to bfloat16 and accumulates in float32, an error of up to about
            2⁻⁸ |v|ᵀ|S||v|, which is large beside v_iᵀ S v_i where that cancels.

    Returns:
        (p,) float64. Nothing is mutated; deterministic on the same device.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes, devices or a precision that do not fit.
    """
    if S.dtype not in _S_DTYPES:
        raise TypeError(f"S is {S.dtype}; expected torch.float32 or torch.float64")
    if V.dtype not in _V_DTYPES:
        raise TypeError(f"V is {V.dtype}; expected one of {', '.join(map(str, _V_DTYPES))}")
    if S.dim() != 2 or S.shape[0] != S.shape[1]:
        raise ValueError(f"S has shape {tuple(S.shape)}; expected a square matrix")
    if V.dim() != 2 or V.shape[0] != S.shape[0]:
        raise ValueError(f"V has shape {tuple(V.shape)}; expected ({S.shape[0]}, p), as S's n")
    if V.device != S.device:
        raise ValueError(f"V is on {V.device} but S is on {S.device}; expected the same device")
    if precision not in ("accurate", "fast"):
        raise ValueError(f"precision={precision!r}; expected 'accurate' or 'fast'")
    return torch.ops.filet_kernels.quadform_diag(S, V, precision)


@torch.library.custom_op("filet_kernels::quadform_diag", mutates_args=())
def _quadform_op(S: Tensor, V: Tensor, precision: str) -> Tensor:
    with torch.autocast(S.device.type, enabled=False):  # it would round the products' operands
        return quadform_diag_reference(S, V, precision)


@_quadform_op.register_fake
def _quadform_fake(S: Tensor, V: Tensor, precision: str) -> Tensor:
    return V.new_empty(V.shape[1], dtype=torch.float64)
