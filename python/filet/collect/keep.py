"""A pass over data that is not to be forgotten: forward only, the input moments of every target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftModel

from filet.collect.batches import Batches
from filet.collect.groups import groups, moved_to_host
from filet.collect.hooks import MomentHooks
from filet.collect.padding import warn_of_padding, with_padding
from filet.collect.run import BatchRun, over_batches
from filet.collect.together import Together
from filet.config import FiletConfig
from filet.distributed.samples import share
from filet.loss.batch import ForwardFn
from filet.loss.text import check_samples_text, sampled_text
from filet.model.inputs import Prepared, check_dataloader
from filet.model.sharded import units
from filet.model.targets import Target
from filet.system.transfer import values
from filet_kernels import Moments, SecondMoment

__all__ = [
    "Keep",
    "Unlabelled",
    "check_keep",
    "check_keep_used",
    "collect_keep",
    "hooks_to_keep",
    "kind_of",
    "said_of_keep",
    "with_unseen",
]

Keep = Iterable[Any] | Literal["self"]


def check_keep(keep: Any, peft_model: PeftModel) -> None:
    """TypeError or ValueError for what is neither None, nor batches, nor "self" of this model."""
    if keep is None:
        return
    if not isinstance(keep, str):
        check_dataloader(keep, "keep")
    elif keep == "self":
        check_samples_text(peft_model.base_model.model)
    else:
        raise ValueError(f"keep={keep!r}; expected batches, or 'self' for the model's own text")


def kind_of(keep: Keep | None) -> str | None:
    """What several processes have to have alike: "self", "batches", or None."""
    return keep if isinstance(keep, str) else None if keep is None else "batches"


def check_keep_used(keep: Any, config: FiletConfig) -> None:
    """ValueError for data to keep beside a selection that has no use for them."""
    if keep is not None and config.select not in ("auto", "contrast"):
        raise ValueError(
            f"keep= has no effect with select={config.select!r}; expected select='auto' or "
            "'contrast', or no keep"
        )


@contextmanager
def said_of_keep() -> Iterator[None]:
    """What is wrong with a batch of data to keep is said of them, not of a dataloader."""
    try:
        yield
    except (TypeError, ValueError, FloatingPointError) as error:
        kinds = (TypeError, ValueError, FloatingPointError)  # a subclass may take other arguments
        if type(error) not in kinds or "keep" in str(error):
            raise
        raise type(error)(f"data to keep: {error}") from error


def hooks_to_keep(
    targets: dict[str, Target],
    counted: Iterable[str],
    config: FiletConfig,
    moments: Mapping[str, Moments],
    shared_input: Mapping[str, str],
) -> MomentHooks:
    """Hooks that take the input moments of data to keep, in the spaces of ``moments``, the task's.

    Of those among ``counted`` that saw a token of the task: else the space would be a guess.
    """
    there = [name for name in counted if name in moments]
    tokens = values([moments[name].input.count for name in there])
    seen = {name for name, count in zip(there, tokens, strict=True) if count}
    hooks = MomentHooks(targets, config, seen)
    hooks.follow(moments, shared_input)
    return hooks


def collect_keep(
    peft_model: PeftModel,
    targets: dict[str, Target],
    keep: Keep,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    moments: Mapping[str, Moments],
    shared_input: Mapping[str, str],
    passes: int,
    together: Together | None = None,
) -> tuple[dict[str, SecondMoment], dict[str, int]]:
    """Input moments of data to keep, and how many "samples" and "tokens" they saw.

    The model must be inside :func:`filet.model.isolation.preserved`.

    Args:
        keep: batches, of which ``config.samples`` samples are read, or "self".
        moments, shared_input: of the task, of every target. Those of the data to keep are in their
            spaces and shared alike. One that saw no token of the task gets none of these either:
            its space would be a guess.
        passes: as for the task; with more than one the moments are in host memory.
        together: the processes whose samples they are of, None for this one alone.
    """
    keep, config = _data(peft_model, keep, config, together)
    batches = Batches(keep)
    batches.keep = passes > 1
    parts = groups(targets, passes) if passes > 1 else [list(targets)]
    found: dict[str, SecondMoment] = {}
    counts: dict[str, int] = {}
    for number, part in enumerate(parts, start=1):
        title = "FILet, data to keep"
        title += f", pass {number} of {len(parts)}" if len(parts) > 1 else ""
        hooks = hooks_to_keep(targets, part, config, moments, shared_input)
        run = _Run(peft_model, config, forward_fn, hooks, together)
        alone = run.inputs.asked or getattr(forward_fn, "takes_unlabelled", False)
        drops = alone and run.needs_no_labels
        data = Unlabelled(batches, batches.samples) if drops else batches
        with said_of_keep():
            counts = over_batches(
                run, hooks, data, config, title, show_progress_bar, "data to keep", together
            )
        hooks.finish()
        inputs = {name: its.input for name, its in hooks.moments.items()}
        if together is not None:
            inputs = together.inputs(inputs, shared_input)
        on_host = moved_to_host(inputs.values()) if passes > 1 else {}
        found |= {name: on_host.get(id(side), side) for name, side in inputs.items()}
        if number == 1:
            warn_of_padding(with_padding(peft_model.base_model.model, hooks.unmasked))
    if not counts["tokens"]:
        raise ValueError(Unlabelled.NO_TOKEN)
    del counts["loss_terms"]
    return with_unseen(found, moments), counts


def _data(
    peft_model: PeftModel, keep: Keep, config: FiletConfig, together: Together | None
) -> tuple[Iterable[Any], FiletConfig]:
    """The batches of this process, and the settings by which they are read."""
    group = None if together is None else together.group
    if isinstance(keep, str):
        if group is None:
            return sampled_text(peft_model, config), config
        in_step = bool(units(peft_model))
        batches = sampled_text(peft_model, config, group.rank, group.size, in_step)
        return batches, replace(config, samples=None)
    if group is None:
        return keep, config
    keep, samples = share(group, keep, config.samples)
    return keep, replace(config, samples=samples)


def with_unseen(
    found: Mapping[str, SecondMoment], moments: Mapping[str, Moments]
) -> dict[str, SecondMoment]:
    """What was found of data to keep, and of the other modules of the task moments of nothing."""
    kept = {}
    for name, its in moments.items():
        of = its.input
        kept[name] = (
            found[name]
            if name in found
            else SecondMoment.zeros(of.space, len(of.sum), dtype=of.sum.dtype, device=of.sum.device)
        )
    return kept


class Unlabelled:
    """Batches without their labels: no loss is asked for, and whether they fit does not matter."""

    NO_TOKEN = (
        "no token of the data to keep counts (their masks are 0 everywhere); expected what is not "
        "to be forgotten"
    )

    def __init__(self, batches: Iterable[Any], samples: int | None = None) -> None:
        """``samples``: how many there are, where that is known."""
        self.samples = samples
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if isinstance(batch, Mapping):
                batch = {key: value for key, value in batch.items() if key != "labels"}
            yield batch


class _Run(BatchRun):
    """Takes batches forward."""

    @property
    def needs_no_labels(self) -> bool:
        """The model runs without them.

        An encoder-decoder makes its decoder's input of them, and what a model that is not of
        transformers does is not known.
        """
        return self.inputs.known and not self.inputs.is_encoder_decoder

    def shift(self) -> bool:
        return self.inputs.shift

    @torch.no_grad()
    def through(self, prepared: Prepared) -> int:
        _, given = self.begin(prepared)
        try:
            self.loss.alone(given)
        except ValueError as error:
            if self.inputs.is_encoder_decoder and "labels" not in prepared.batch:
                raise ValueError(
                    f"the decoder has no input ({error}); expected batches with labels, or with "
                    "decoder_input_ids"
                ) from error
            raise
        self.hooks.phase = "idle"
        return 0
