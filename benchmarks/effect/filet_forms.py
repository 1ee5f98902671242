"""FILet's forms: which directions, in what proportions, how large, subtracted or with B = 0.

Energies, choice and factors are the library's (:mod:`filet_kernels`), from its own statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
from peft import get_peft_model
from torch import Tensor

from effect.context import Context
from effect.of_peft import factors_in
from effect.published import subtracted, zero
from effect.start import Start
from filet import FiletConfig, apply_statistics
from filet_kernels import fisher_energies, lora_factors, select

__all__ = ["GAMMA", "filet", "filet_keep", "filet_orthogonal"]

GAMMA = 1 / 3  # the mean of c with which ‖A‖ is that of LoRA's default

Selection = Literal["min", "random", "max"]
Scaling = Literal["fisher", "singular", "constant_min", "constant_max"]


def _energies(context: Context, normalization: Literal["mean", "sum"]) -> dict[str, Tensor]:
    def make() -> dict[str, Tensor]:
        moments = context.statistics.moments
        return {
            name: fisher_energies(W, moments[name], normalization=normalization)
            for name, W in context.weights.items()
        }

    return context.once(("energies", normalization), make)


def _relative(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with c_i = ‖a_i‖² scaled to a mean of γ."""
    mean = A.square().sum(1).mean()
    if not mean > 0:
        raise ValueError(f"{name}: no chosen direction has any energy; expected more samples")
    factor = (GAMMA / mean).sqrt()
    return A * factor, B * factor


def _start(A: Tensor, B: Tensor, start: str) -> Start:
    return zero(A, len(B)) if start == "zero" else subtracted(A, B)


def filet(
    context: Context, how: Selection, scaling: Scaling, magnitude: str, start: str
) -> dict[str, Start]:
    """A = diag(c)^½ V̂_Iᵀ and B = Û_I diag(c)^½ (arXiv 2605.01046, Algorithm 1).

    Args:
        how: the choice of I, the paper's M, R and P.
        scaling: c, see :func:`filet_kernels.lora_factors`.
        magnitude: "mean", the paper's, has E of the mean loss, "sum" of the summed loss; "relative"
            scales c to a mean of γ = 1/3.
        start: "untouched" subtracts B A beside W; "zero" has this A and B = 0.
    """
    energies, found = _energies(context, "sum" if magnitude == "sum" else "mean"), {}
    for name, W in context.weights.items():
        E = energies[name]
        chosen = select(E, context.rank, how, seed=context.seed)
        # In float64: the energies of a mean loss are about 1e-16.
        A, B = lora_factors(W.double(), E, chosen, scaling=scaling, dtype=torch.float64)
        if magnitude == "relative":
            A, B = _relative(name, A, B)
        found[name] = _start(A, B, start)
    return found


def filet_orthogonal(
    context: Context, how: Selection, scaling: str, start: str
) -> dict[str, Start]:
    """The same with orthonormal directions, at the relative magnitude.

    Q of V̂_I = Q R, whose columns are in the order of rising energy: those of low energy are near
    parallel. Û = normalize_columns(W Q). c_i = E_i of v̂_i for "fisher", ‖W q_i‖ for "singular",
    and the same for all for "constant".
    """
    energies, found = _energies(context, "mean"), {}
    for name, W in context.weights.items():
        E, W = energies[name], W.double()
        chosen = select(E, context.rank, how, seed=context.seed)
        chosen = chosen[E[chosen].argsort(stable=True)]
        rows, _ = lora_factors(W, E, chosen, scaling="singular", dtype=torch.float64)
        Q, R = torch.linalg.qr(torch.nn.functional.normalize(rows, dim=1).T)
        Q = torch.where(R.diagonal() < 0, -Q, Q)  # along v̂, whatever LAPACK's sign
        of_W = (WQ := W @ Q).norm(dim=0)
        c = {"fisher": E[chosen], "singular": of_W, "constant": torch.ones_like(of_W)}[scaling]
        root = c.sqrt()
        A, B = _relative(name, root.unsqueeze(1) * Q.T, WQ / of_W * root)
        found[name] = _start(A, B, start)
    return found


def filet_keep(context: Context, damping: float, own_text: bool = False) -> dict[str, Start]:
    """What :func:`filet.initialize_lora_filet_weights` makes with ``keep=``, at γ = 1/3.

    Args:
        damping: over the mean eigenvalue of the moment to keep.
        own_text: what is kept is text drawn from the model, ``keep="self"``.
    """
    model = get_peft_model(context.load(), context.config())
    config = FiletConfig(damping=damping, gamma=GAMMA)
    apply_statistics(model, context.kept_statistics(own_text), config)
    return {name: Start(A, B) for name, (A, B) in factors_in(model).items()}
