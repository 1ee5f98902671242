"""Congruences W S Wᵀ of a symmetric S: the second moment of y = Wx from that of x.

With L the lower triangle of S, half of its diagonal in it, S = L + Lᵀ and
    W S Wᵀ = H + Hᵀ,   H = W L Wᵀ = Σ_r W_r (L_r Wᵀ)
over blocks r of rows of L and of columns of W. Only that triangle is read, with half of the
operations of S Wᵀ.

Two implementations: the Triton kernel of :mod:`filet_kernels.congruence_triton`, and plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, on, why_no_triton
from filet_kernels.product import exact_float32, slices

__all__ = ["congruence"]


def congruence(W: Tensor, S: Tensor, rows: int, backend: str | None = None) -> Tensor:
    """W S Wᵀ, (m, m), both triangles, float32 of float32's precision; float64 for such a W or S.

    Args:
        W: (m, n), any floating dtype, any strides.
        S: (n, n), float32 or float64; only the lower triangle is read. Any strides.
        rows: of S at a time; the largest temporary is (rows, m), or (m, m) where that is more.
        backend: "triton", "reference", or None for the first that supports the operands.

    Nothing is mutated; deterministic.
    """
    m, n = W.shape
    dtype = torch.float64 if torch.float64 in (W.dtype, S.dtype) else torch.float32
    add_block = _ADD_BLOCK.choose(backend, W, S).run
    H = torch.zeros(m, m, dtype=dtype, device=W.device)
    for block in slices(n, rows):
        LW = torch.empty(block.stop - block.start, m, dtype=dtype, device=W.device)
        add_block(H, LW, S[block, : block.stop], W, block)
    return H + H.T


def _triton_unsupported(W: Tensor, S: Tensor) -> str | None:
    if torch.float64 in (W.dtype, S.dtype):
        return f"W is {W.dtype}, S is {S.dtype}; expected at most torch.float32"
    return why_no_triton("W", W.device)


def _triton(H: Tensor, LW: Tensor, L: Tensor, W: Tensor, block: slice) -> None:
    from filet_kernels.congruence_triton import add_product

    with on(W.device):
        add_product(LW, L, W[:, : block.stop].T, diagonal=block.start, anew=True)
        add_product(H, LW.T, W[:, block].T)


def _reference(H: Tensor, LW: Tensor, L: Tensor, W: Tensor, block: slice) -> None:
    with exact_float32():
        _lower_product(LW, L, W)
        H.addmm_(LW.T, W[:, block].T.to(H.dtype))  # Hᵀ


# Adds W_r (L_r Wᵀ) of a block r to H; LW is its temporary.
_ADD_BLOCK = Operation(
    Backend("triton", _triton, _triton_unsupported), Backend("reference", _reference)
)


def _lower_product(out: Tensor, L: Tensor, W: Tensor) -> None:
    """out = L Wᵀ, of rows of S up to the diagonal, which counts half, with the columns of W."""
    rows, stop = L.shape
    triangle = torch.tril(L[:, stop - rows :])
    triangle.diagonal().mul_(0.5)
    torch.mm(triangle.to(out.dtype), W[:, stop - rows : stop].T.to(out.dtype), out=out)
    for columns in slices(stop - rows, rows):
        out.addmm_(L[:, columns].to(out.dtype), W[:, columns].T.to(out.dtype))
