"""Initialisations by their published recipes, which PEFT does not have.

Each takes a :class:`effect.context.Context` and returns starts by layer. W = U Σ Vᵀ is the layer's
weight, S_X, S_Y and G are its moments (:mod:`effect.moments`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effect.context import Context
from effect.moments import LayerMoments
from effect.start import Start
from recipes import milora as milora_factors

__all__ = [
    "cg_lora",
    "farss",
    "fisher_scores",
    "lora_da",
    "milora",
    "subtracted",
    "whitened",
    "zero",
]

_DAMPING = 1e-3  # of a moment, in its mean eigenvalue
_FARSS_LARGEST = 128  # the rank from which its code takes the largest scores
_LORA_DA_GAMMA = 1024.0


def zero(A: Tensor, m: int) -> Start:
    """A (r, n) with B = 0 (m, r)."""
    A = A.float()
    return Start(A, A.new_zeros(m, A.shape[0]))


def subtracted(A: Tensor, B: Tensor) -> Start:
    """A and B with B A taken off again."""
    A, B = A.float(), B.float()
    return Start(A, B, A, B)


def milora(context: Context) -> dict[str, Start]:
    """MiLoRA: the smallest singular triplets (arXiv 2406.09044), see :func:`recipes.milora`."""
    return {
        name: subtracted(*milora_factors(W, context.rank, 1.0)[:2])
        for name, W in context.weights.items()
    }


def fisher_scores(svd: tuple[Tensor, Tensor, Tensor], moments: LayerMoments) -> Tensor:
    """(vᵢᵀ S_X vᵢ)(uᵢᵀ S_Y uᵢ) of every singular direction, (k,)."""
    U, _, Vh = svd
    return ((Vh @ moments.S_X) * Vh).sum(1) * ((moments.S_Y @ U) * U).sum(0)


def farss(context: Context) -> dict[str, Start]:
    """FARSS at equal ranks (ACL Findings 2026, 2026.findings-acl.883).

    Scores σᵢ² (vᵢᵀ S_X vᵢ)(uᵢᵀ S_Y uᵢ); of these the r smallest,
    A = Σ_I^½ V_Iᵀ, B = U_I Σ_I^½, W_res = W − B A.

    As in chenyehuang/FARSS, init.py, which from rank 128 on takes the largest instead. Its scores
    are of at most 1024 tokens a batch, padding among them; here all counted tokens. Its allocation
    of ranks to layers is left out: every method here has the same ranks. The paper's own text was
    not at hand.
    """
    found = {}
    for name, (U, sigma, Vh) in context.singular.items():
        scores = sigma**2 * fisher_scores((U, sigma, Vh), context.moments[name])
        chosen = torch.topk(scores, context.rank, largest=context.rank >= _FARSS_LARGEST).indices
        chosen, root = chosen.sort().values, sigma.sqrt()
        root = root[chosen]
        found[name] = subtracted(root.unsqueeze(1) * Vh[chosen], U[:, chosen] * root)
    return found


def _root(S: Tensor) -> Tensor:
    """L of L Lᵀ = S + damping. Where S^½ was meant, L differs by a rotation that cancels."""
    damped = S + _DAMPING * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return torch.linalg.cholesky(damped)


def _top_singular(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), σ (r,), V (n, r) of the r largest, by the smaller Gram matrix.

    Its squares cost no accuracy that the largest would miss in float64, and it takes a fraction of
    the time of a singular value decomposition on a GPU.
    """
    if M.shape[0] < M.shape[1]:
        V, sigma, U = _top_singular(M.T, rank)
        return U, sigma, V
    squares, V = torch.linalg.eigh(M.T @ M)
    sigma, V = squares[-rank:].flip(0).clamp_min(0).sqrt(), V[:, -rank:].flip(1)
    return M @ V / sigma.clamp_min(torch.finfo(M.dtype).tiny), sigma, V


def _newton(context: Context) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The rank-r Newton step −L Σ R of every layer: R (r, n), Σ (r,), L (m, r).

    S_Y^-½ G S_X^-½ = U Σ Vᵀ, R = V_rᵀ S_X^-½, L = S_Y^-½ U_r, each moment damped by 1e-3 of its
    mean eigenvalue.
    """

    def make() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        roots: dict[int, Tensor] = {}  # of S_X, which layers share
        found = {}
        for name, its in context.moments.items():
            L_X = roots.setdefault(id(its.S_X), _root(its.S_X))
            L_Y = _root(its.S_Y)
            left = torch.linalg.solve_triangular(L_Y, its.G, upper=False)
            M = torch.linalg.solve_triangular(L_X, left.T, upper=False).T
            U, sigma, V = _top_singular(M, context.rank)
            right = torch.linalg.solve_triangular(L_X.T, V, upper=True)
            found[name] = (right.T, sigma, torch.linalg.solve_triangular(L_Y.T, U, upper=True))
        return found

    return context.once(("newton", context.rank), make)


def whitened(context: Context, start: str) -> dict[str, Start]:
    """Directions of the gradient whitened by both moments, at the magnitude of LoRA's default.

    The rows of A are those of V_rᵀ S_X^-½, each of length 3^-½; ``start="zero"`` has B = 0,
    "untouched" the columns of −S_Y^-½ U_r at the same length, subtracted.
    """
    found = {}
    for name, (R, _, L) in _newton(context).items():
        A = R / R.norm(dim=1, keepdim=True) / math.sqrt(3)
        B = -L / L.norm(dim=0) / math.sqrt(3)
        found[name] = zero(A, len(L)) if start == "zero" else subtracted(A, B)
    return found


def cg_lora(context: Context) -> dict[str, Start]:
    """The rank-r Newton step split evenly, A = Σ^½ R, B = −L Σ^½, at LoRA's magnitude.

    After CG-LoRA (arXiv 2603.29824), whose abstract has low-rank updates along the gradient
    whitened by curvature. Its text and code were not at hand: the even split, ‖A‖² = ‖B‖² = r/3 and
    the subtraction are ours, and its form without subtraction, in which the step itself is applied,
    is missing.
    """
    found = {}
    for name, (R, sigma, L) in _newton(context).items():
        A, B = sigma.sqrt().unsqueeze(1) * R, -L * sigma.sqrt()
        size = math.sqrt(context.rank / 3)
        found[name] = subtracted(A * (size / A.norm()), B * (size / B.norm()))
    return found


def lora_da(context: Context) -> dict[str, Start]:
    """LoRA-DA without its variance term (arXiv 2510.24561).

    Δ = −diag(S_Y)^-1 G S_X^-1 over its largest singular value; A = V_rᵀ / γ^½ of its top right
    singular vectors, B = Δ V_r / γ^½, W_res = W − B A, γ = 1024.

    As in zqy0126/LoRA-DA, lora_da.py with variance_beta=0, its default (conf/lora_da.yaml has
    0.03). There 1e-6 is added to the moments of the mean loss of single samples, here 1e-3 of their
    mean eigenvalue, which does not depend on the loss's reduction.
    """
    found = {}
    for name, its in context.moments.items():
        Gt = torch.cholesky_solve(its.G.T, _root(its.S_X))
        y = its.S_Y.diagonal()
        delta = -Gt.T / (y + _DAMPING * y.mean()).unsqueeze(1)
        U, sigma, V = _top_singular(delta, context.rank)
        root = math.sqrt(_LORA_DA_GAMMA)
        found[name] = subtracted(V.T / root, U * (sigma / sigma[0]) / root)
    return found
