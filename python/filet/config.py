"""What a FILet initialisation does: one frozen, validated object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from filet_kernels.energy import Normalization
from filet_kernels.lora import Scaling, Selection

__all__ = [
    "Choices",
    "FiletConfig",
    "Fisher",
    "LossReduction",
    "Magnitude",
    "Start",
    "checked_config",
    "resolved",
]

Choices = Literal["auto", "contrast", Selection]

Magnitude = Literal["relative", Normalization]

Start = Literal["zero", "untouched"]

Fisher = Literal["empirical", "sampled"]

LossReduction = Literal["auto", "mean", "sum"]


_LARGEST = 1e6  # of γ: with it a row of length √(γ r) still fits float16


@dataclass(frozen=True)
class FiletConfig:
    """Settings of :func:`filet.initialize_lora_filet_weights` (FILet, arXiv 2605.01046).

    Attributes:
        start: "zero" gives A the scaled directions and leaves B at 0, so that the adapter is plain
            LoRA from the first moment and nothing is subtracted. "untouched" has the paper's A0 and
            B0, with their product subtracted by a frozen half of the adapter, beside a W that
            nobody changes (docs/adapters.md); :func:`filet.write_residual` makes of that the
            paper's W_res.
        select: which directions become the adapter: the "min" Fisher energies (the paper's main
            method), the "max", or "random" ones; or "contrast", those of largest task over data to
            keep (:func:`filet_kernels.contrast_directions`), which needs ``keep``. "auto" is
            "contrast" where there is data to keep, else "min".
        damping: of "contrast", over the mean eigenvalue of the moment to keep.
        scaling: of A and B: "fisher", "singular", "constant_min" or "constant_max", see
            :func:`filet_kernels.lora_factors`.
        normalization: of c, by which A and B are scaled; it changes no choice. "relative" is c over
            its mean over the chosen directions, times ``gamma``: the paper's proportions, whatever
            the loss's reduction, the batch and the dtype. "mean" is the paper's own c, with g the
            gradient of the mean loss over the whole minibatch; "sum" that of the summed loss.
        gamma: γ of "relative", and c of every direction of "contrast". At 1/3, with an alpha that
            makes PEFT's scaling 1, ‖A‖ is as large as that of LoRA's default; at 4/3, twice as
            large, fine-tuning ended better (docs/evidence.md).
        orthogonal: makes the chosen directions orthonormal, in the order of their choice, before
            they are scaled; the paper takes them as they are. Those of low energy lie close
            together. Not with "contrast", whose rows are orthogonal in what is to be kept.
        fisher: labels from the data ("empirical", the paper's) or drawn from the model's own
            predictions ("sampled", the true Fisher; needs ``outputs.logits`` and labels that say
            which positions count).
        samples: size of the minibatch, 320 in the paper; the dataloader is read no further. None
            reads all of it. The last batch is cut to it, unless its tensors' rows are not its
            samples (images as flattened patches): that one counts as a whole.
        token_mask: name of the batch's entry that says which tokens count, (samples, tokens), 0 for
            padding. One of another name than the default, "attention_mask", is not given to the
            model (a ``forward_fn`` gets the whole batch). None counts every token. A mask from
            which padding cannot be told (additive, or of queries and keys) is an error.
        seed: of the random selection and of the sampled labels.
        loss_reduction: what the loss is that the model (or ``forward_fn``) returns: the "mean" or
            the "sum" over the labelled positions. "auto" compares the first batch's loss with both,
            and is an error where neither fits. A ``forward_fn`` that returns ``(loss, terms)``
            settles it: the mean over that many terms.
        share_inputs: modules called with the very same tensor (q/k/v, gate/up) share one input
            moment. False gives each its own: more memory and time, the same energies to rounding;
            with data to keep, other directions (docs/keep.md).
        passes: over how many groups of blocks the moments are taken, one after the other, each in a
            forward and backward of its own over the same batches; the moments of a finished group
            go to host memory. Each pass costs a forward and backward and needs room on the GPU for
            its own moments only. "auto" is one on a CPU, and where the moments take less than two
            fifths of the GPU's free memory; else as few as fit beside the first batch, of which one
            and two samples are measured (see :func:`filet.estimate`); at most one a block. With
            more than one, batches are kept in host memory, and the model has to do the same with a
            batch every time.
    """

    start: Start = "zero"
    select: Choices = "auto"
    damping: float = 1e-2
    scaling: Scaling = "fisher"
    normalization: Magnitude = "relative"
    gamma: float = 4 / 3
    orthogonal: bool = True
    fisher: Fisher = "empirical"
    samples: int | None = 320
    token_mask: str | None = "attention_mask"
    seed: int = 0
    loss_reduction: LossReduction = "auto"
    share_inputs: bool = True
    passes: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            allowed = get_args(hints[field.name])
            value = getattr(self, field.name)
            if allowed and all(isinstance(choice, str) for choice in allowed):
                if value not in allowed:
                    raise ValueError(f"{field.name}={value!r}; expected one of {allowed}")
        for name in ("damping", "gamma"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= _LARGEST:
                raise ValueError(f"{name}={value!r}; expected a positive number, at most 1e6")
        if self.normalization != "relative" and self.gamma != type(self).gamma:
            raise ValueError(
                f"gamma={self.gamma!r} has no effect with normalization={self.normalization!r}; "
                "expected normalization='relative', or no gamma"
            )
        if self.samples is not None and (type(self.samples) is not int or self.samples < 1):
            raise ValueError(f"samples={self.samples!r}; expected an integer ≥ 1, or None for all")
        if self.token_mask is not None and not isinstance(self.token_mask, str):
            raise ValueError(
                f"token_mask={self.token_mask!r}; expected a name, or None for no mask"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}; expected an integer in [0, 2**63)")
        if self.passes != "auto" and (type(self.passes) is not int or self.passes < 1):
            raise ValueError(f"passes={self.passes!r}; expected an integer ≥ 1, or 'auto'")
        for name in ("orthogonal", "share_inputs"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}; expected True or False")


def checked_config(config: Any) -> FiletConfig:
    """The settings, the defaults for None; TypeError for anything else."""
    if config is None:
        return FiletConfig()
    if not isinstance(config, FiletConfig):
        what = f"{config!r}" if isinstance(config, (Mapping, str)) else f"a {type(config).__name__}"
        raise TypeError(
            f"config is {what}; expected a filet.FiletConfig, FiletConfig(samples=320) say"
        )
    return config


# What has no meaning for directions that are chosen by energy, and for those that are not.
_OF_CONTRAST, _OF_ENERGIES = ("damping",), ("scaling", "normalization", "orthogonal")


def resolved(config: FiletConfig, keep: bool) -> FiletConfig:
    """The settings with ``select`` decided; ``keep``: whether there are moments of data to keep.

    ValueError for "contrast" without them, and for a setting that the selection would ignore.
    """
    select = config.select
    if select == "auto":
        select = "contrast" if keep else "min"
    if select == "contrast" and not keep:
        raise ValueError(
            "select='contrast' without moments of data to keep; expected keep=, batches of what is "
            "not to be forgotten or 'self', or statistics that were collected with it"
        )
    ignored = _OF_ENERGIES if select == "contrast" else _OF_CONTRAST
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ignored and value != field.default:
            raise ValueError(
                f"{field.name}={value!r} has no effect with select={select!r}; expected "
                f"{field.default!r}, or another selection"
            )
    return replace(config, select=select)
