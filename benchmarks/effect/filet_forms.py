"""FILet's forms: which directions, in what proportions, how large, subtracted or with B = 0.

Energies, choice and factors are the library's (:mod:`filet_kernels`), from its own statistics.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import Tensor

from effect.context import Context
from effect.of_peft import factors_in
from effect.published import subtracted, zero
from effect.start import Start
from filet import FiletConfig, apply_statistics
from filet_kernels import fisher_energies, lora_factors, select

__all__ = ["GAMMA", "filet", "filet_keep"]

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


def _start(A: Tensor, B: Tensor, start: str) -> Start:
    return zero(A, len(B)) if start == "zero" else subtracted(A, B)


def filet(
    context: Context,
    how: Selection,
    scaling: Scaling,
    magnitude: str,
    start: str,
    orthogonal: bool = False,
) -> dict[str, Start]:
    """A = diag(c)^½ V̂_Iᵀ and B = Û_I diag(c)^½ (arXiv 2605.01046, Algorithm 1).

    Args:
        how: the choice of I, the paper's M, R and P.
        scaling: c, see :func:`filet_kernels.lora_factors`.
        magnitude: "mean", the paper's, has E of the mean loss, "sum" of the summed loss; "relative"
            scales c to a mean of γ = 1/3.
        orthogonal: takes Q of V̂_I = Q R.
        start: "untouched" subtracts B A beside W; "zero" has this A and B = 0.
    """
    energies, found = _energies(context, "sum" if magnitude == "sum" else "mean"), {}
    for name, W in context.weights.items():
        E = energies[name]
        chosen = select(E, context.rank, how, seed=context.seed)
        # In float64: the energies of a mean loss are about 1e-16.
        gamma = GAMMA if magnitude == "relative" else None
        sizes: dict[str, Any] = {"scaling": scaling, "gamma": gamma, "orthogonal": orthogonal}
        A, B = lora_factors(W.double(), E, chosen, dtype=torch.float64, **sizes)
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
