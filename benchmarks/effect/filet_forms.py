"""FILet's forms: which directions, in what proportions, how large, subtracted or with B = 0.

Energies, choice and factors are the library's (:mod:`filet_kernels`), from its own statistics.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import Tensor

from effect.context import Context
from effect.directions import generalised
from effect.moments import Batch, counted_tokens, task_moments, without_labels
from effect.of_peft import factors_in
from effect.published import subtracted, zero
from effect.start import Start
from filet import FiletConfig, apply_statistics
from filet.model.batch import IGNORED
from filet_kernels import fisher_energies, lora_factors, select

__all__ = ["GAMMA", "filet", "filet_keep", "filet_keep_both"]

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


def filet_keep_both(context: Context, damping: float) -> dict[str, Start]:
    """A of :func:`filet_keep`, and B the same of the output side, subtracted.

    With the moments' Kronecker product for the Fisher matrix, moving W by u aᵀ counts for the task
    (aᵀ S_X a)(uᵀ S_Y u), and for what is to be kept the same of its moments. The quotient of both
    is greatest where that of either side is: for B, the r top generalised eigenvectors u of

        S_Y u = μ (S_Y⁰ + δ tr(S_Y⁰)/m · I) u,

    by their values, as A's rows are. Columns have LoRA's length at this magnitude, 3^-½. With
    B = 0 the outputs could choose nothing, hence the subtraction. S_Y⁰ is of labels drawn from the
    model, as the curvature of the KL divergence from it is: the data's own are not needed.
    """
    inputs = filet_keep(context, damping)
    kept = context.once("kept outputs", lambda: _kept_outputs(context))
    found = {}
    for name, start in inputs.items():
        S, S0 = context.moments[name].S_Y, kept[name]
        u, _ = generalised(S, S0, damping * float(S0.diagonal().mean()), context.rank)
        found[name] = subtracted(start.A, u.T / math.sqrt(3))
    return found


def _kept_outputs(context: Context) -> dict[str, Tensor]:
    """S_Y of the data to keep, with labels drawn from the model."""
    generator = torch.Generator(next(context.base.parameters()).device).manual_seed(0)

    def own_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = model(**without_labels(batch)).logits
        shape = logits.shape[:-1]
        logits = logits.flatten(0, -2).float()
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).squeeze(1)
        counted = counted_tokens(batch)
        if counted is not None and counted.shape == shape:
            labels[~counted.flatten()] = IGNORED
        terms = int((labels != IGNORED).sum())
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED), terms

    moments = task_moments(context.base, context.layers, context.keep or (), own_loss)
    return {name: its.S_Y for name, its in moments.items()}
