"""Starts that choose directions of the input alone: EVA's at LoRA's magnitude, and the contrast.

Both have unit rows or powers of their eigenvalues, and ‖A‖² = r/3 in the end, which is what LoRA's
default has on average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effect.context import Context
from effect.published import subtracted, zero
from effect.start import Start

__all__ = ["contrast", "eva_like", "generalised"]


def _sized(rows: Tensor, values: Tensor, power: float) -> Tensor:
    """diag(values)^power rows (r, n), scaled to ‖A‖² = r/3."""
    A = values.clamp_min(torch.finfo(values.dtype).tiny).pow(power).unsqueeze(1) * rows
    return A * (math.sqrt(len(A) / 3) / A.norm())


def eva_like(context: Context, power: float) -> dict[str, Start]:
    """A = diag(λ)^power Qᵀ of the r largest eigenvalues λ of S_X, ‖A‖² = r/3, B = 0.

    EVA (arXiv 2410.07170) has power 0 and unit rows, √3 times as long.
    """

    def make() -> dict[int, tuple[Tensor, Tensor]]:
        moments = {id(its.S_X): its.S_X for its in context.moments.values()}
        return {key: torch.linalg.eigh(S) for key, S in moments.items()}

    eigen = context.once("eigen", make)
    found = {}
    for name, W in context.weights.items():
        values, Q = eigen[id(context.moments[name].S_X)]
        top = slice(-context.rank, None)
        found[name] = zero(_sized(Q[:, top].T.flip(0), values[top].flip(0), power), len(W))
    return found


def generalised(
    S: Tensor, S0: Tensor, damping: float, rank: int, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The top generalised eigenvectors of (S, S0 + damping · I), unit rows (r, n), and values (r,).

    S a = λ (S0 + damping · I) a; with a basis Q (n, d) of orthonormal columns the same for
    a = Q z and forms in z. Computed by S0's Cholesky factor.
    """
    if basis is not None:
        S, S0 = basis.T @ S @ basis, basis.T @ S0 @ basis
    eye = torch.eye(len(S0), dtype=S0.dtype, device=S0.device)
    L = torch.linalg.cholesky(S0 + damping * eye)
    half = torch.linalg.solve_triangular(L, S, upper=False)
    values, u = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
    rows = torch.linalg.solve_triangular(L.T, u[:, -rank:].flip(1), upper=True)
    rows = rows if basis is None else basis @ rows
    return (rows / rows.norm(dim=0)).T, values[-rank:].flip(0)


def _contrasted(context: Context, delta: float, rows: bool) -> dict[str, tuple[Tensor, Tensor]]:
    known: dict[tuple[int, str | None], tuple[Tensor, Tensor]] = {}  # layers share their inputs
    found = {}
    for name, W in context.weights.items():
        S, S0 = context.moments[name].S_X, context.keep_moments[name]
        m, n = W.shape
        within = rows and m < n  # otherwise W's row space is everything
        key = (id(S), name if within else None)
        if key not in known:
            basis = torch.linalg.qr(W.double().T)[0] if within else None
            damping = delta * float(S0.diagonal().mean())
            known[key] = generalised(S, S0, damping, context.rank, basis)
        found[name] = known[key]
    return found


def contrast(
    context: Context, delta: float, rows: bool, power: float, start: str
) -> dict[str, Start]:
    """Directions that are large in the task's inputs and small in those of the data to keep.

    The r top generalised eigenvectors a of (S, S₀ + δ tr(S₀)/n · I), S = S_X of the task, S₀ = S_X
    of the data to keep. The traces of S and S₀ do not matter: either factor leaves the vectors what
    they are, and the eigenvalues in proportion. A = diag(λ)^power of unit rows, ‖A‖² = r/3.

    Args:
        rows: only directions in W's row space, a = Wᵀ z: those that W does not ignore.
        start: "zero" has B = 0; "untouched" B = normalize_columns(W Aᵀ) / √3, subtracted.
    """
    key = ("contrast", delta, rows, context.rank)
    chosen = context.once(key, lambda: _contrasted(context, delta, rows))
    found = {}
    for name, W in context.weights.items():
        A = _sized(*chosen[name], power)
        if start == "zero":
            found[name] = zero(A, len(W))
        else:
            B = torch.nn.functional.normalize(W.double() @ A.T, dim=0) / math.sqrt(3)
            found[name] = subtracted(A, B)
    return found
