"""Algorithm 1 of FILet (arXiv 2605.01046) exactly as the paper writes it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_columns(M: Tensor) -> Tensor:
    return M / torch.linalg.vector_norm(M, dim=0)


def fisher_energies(W: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """E (n,) from W (m, n), inputs x (T, n) and output gradients g (T', m), everything explicit."""
    W, x, g = W.double(), x.double(), g.double()
    S_X = x.T @ x / x.shape[0]
    S_Y = g.T @ g / g.shape[0]
    V = normalize_columns(W.T @ W)
    U = normalize_columns(W @ V)
    return (V * (S_X @ V)).sum(0) * (U * (S_Y @ U)).sum(0)


def factors(W: Tensor, energies: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, n), B (m, r) and W_res of the ``rank`` smallest energies."""
    W = W.double()
    chosen = torch.argsort(energies, stable=True)[:rank]
    V = normalize_columns(W.T @ W)
    U = normalize_columns(W @ V)
    root = energies[chosen].sqrt()
    A = root.unsqueeze(1) * V[:, chosen].T
    B = U[:, chosen] * root
    return A, B, W - scale * B @ A
