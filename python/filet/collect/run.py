"""The pass over the data: every batch forward and backward, its moments taken by the hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from filet.collect.batches import PreparedBatches
from filet.collect.hooks import MomentHooks
from filet.collect.in_step import InStep
from filet.collect.padding import warn_of_padding, with_padding
from filet.collect.scale import backward, loss_scale
from filet.collect.together import Together
from filet.config import FiletConfig
from filet.loss.batch import BatchLoss, ForwardFn
from filet.model.batch import IGNORED, tensors_in
from filet.model.inputs import Inputs, Prepared
from filet.model.targets import Target
from filet.system.memory import named_shortage

__all__ = ["BatchRun", "check_terms", "collect_moments", "over_batches"]


def collect_moments(
    peft_model: PeftModel,
    targets: dict[str, Target],
    dataloader: Iterable[Any],
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    counted: Collection[str] | None = None,
    gradient_scale: float | None = None,
    title: str = "FILet statistics",
    together: Together | None = None,
) -> tuple[MomentHooks, dict[str, int]]:
    """Run the samples forward and backward; returns the hooks' moments and the counts.

    The model must be inside :func:`preserved`. Counts: as of :func:`over_batches`.
    ``counted``: the targets whose moments are taken, all by default. ``gradient_scale``: what an
    earlier pass over the same batches found (its hooks keep it); None finds it. ``together``: the
    processes whose samples the counts are of; the moments are of this one's.
    """
    base_model = peft_model.base_model.model
    _check_outputs(base_model, forward_fn)
    hooks = MomentHooks(targets, config, counted)
    run = _Run(peft_model, config, forward_fn, hooks, together, gradient_scale)
    counts = over_batches(
        run, hooks, dataloader, config, title, show_progress_bar, together=together
    )
    check_terms(counts["samples"], counts["loss_terms"])
    hooks.finish()
    if together is not None:
        hooks.leave_uncounted()
    for moments in hooks.moments.values():
        # Of the whole run, also for a module (an expert) that only later batches reached.
        moments.loss_terms.fill_(counts["loss_terms"])
    warn_of_padding(with_padding(base_model, hooks.unmasked))
    return hooks, counts


class BatchRun(ABC):
    """Takes batches through the model under hooks.

    Attributes:
        inputs: what the model takes.
        loss: what becomes of a batch.
        hooks: that count it.
        in_step: of several processes, has them run a sharded model equally often.
        batch: that is under way, or was last.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        config: FiletConfig,
        forward_fn: ForwardFn | None,
        hooks: MomentHooks,
        together: Together | None,
    ) -> None:
        base_model = peft_model.base_model.model
        self.inputs = Inputs(base_model, forward_fn)
        self.in_step = InStep() if together is None else together.in_step
        most = self.in_step.most if self.in_step.several else None
        self.loss = BatchLoss(config, peft_model, self.inputs, forward_fn, most)
        self.hooks = hooks
        self.batch: Prepared | None = None
        self._token_mask = config.token_mask
        self._device = _input_device(base_model)

    def begin(self, prepared: Prepared) -> tuple[Any, Any]:
        """A batch whose forward is next: all of it on the device, and what the model gets."""
        self.batch = prepared
        found = self.inputs.given(prepared.batch, self._device, self._token_mask)
        self.hooks.start_batch(prepared.masks)
        self.hooks.phase = "forward"
        return found

    @abstractmethod
    def shift(self) -> bool:
        """Whether a label is predicted by the token before its own."""

    @abstractmethod
    def through(self, prepared: Prepared) -> int:
        """One batch; returns the terms of its loss."""


def over_batches(
    run: BatchRun,
    hooks: MomentHooks,
    dataloader: Iterable[Any],
    config: FiletConfig,
    title: str,
    show_progress_bar: bool,
    name: str = "dataloader",
    together: Together | None = None,
) -> dict[str, int]:
    """Every batch through the model under the hooks; returns "samples", "tokens", "loss_terms"
    and "data", the sum of a hash of each sample.

    With ``together`` the counts are of all processes; one of them may have no sample.
    """
    batches = PreparedBatches(dataloader, config, run.inputs, run.shift)
    known = getattr(dataloader, "samples", None)
    title = title if together is None else f"{together.group}: {title}"
    counts = {"samples": 0, "tokens": 0, "loss_terms": 0, "data": 0}
    with (
        _Progress(known, config.samples, title, show_progress_bar) as progress,
        hooks,
        named_shortage("pass", lambda: _place(hooks, batches.index, run.batch)),
    ):
        hooks.unrounded.most = run.in_step.most
        for batch, mine in run.in_step.batches(batches):
            through = partial(run.in_step.run, run.through, batch)
            hooks.counting = mine
            terms = through()
            hooks.finish_batch(batch.index, through)
            if not mine:
                continue
            counts["samples"] += batch.samples
            counts["tokens"] += batch.tokens
            counts["loss_terms"] += terms
            counts["data"] += batch.data
            progress.advance(batch.samples, counts["tokens"])
        hooks.add_left_out()
        progress.end(counts["samples"])
    if together is not None:
        counts = together.group.summed(counts)
    if counts["samples"] == 0:
        raise ValueError(f"the {name} gave no sample; expected at least one")
    return counts


class _Run(BatchRun):
    """Takes batches forward and backward.

    Attributes:
        scale: by which the loss is multiplied; None until a batch has a term.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        config: FiletConfig,
        forward_fn: ForwardFn | None,
        hooks: MomentHooks,
        together: Together | None,
        scale: float | None,
    ) -> None:
        super().__init__(peft_model, config, forward_fn, hooks, together)
        self.scale = scale

    def shift(self) -> bool:
        return self.loss.summed.shift

    def through(self, prepared: Prepared) -> int:
        hooks, index = self.hooks, prepared.index
        batch, given = self.begin(prepared)
        loss = self.loss(given, prepared.batch, batch, self._counted_already)
        if self.scale is None and self.in_step.most(loss.terms):
            self.scale = loss_scale(hooks, loss, index, self.in_step) if hooks.half else 1.0
        hooks.phase = "backward"
        hooks.gradient_scale = self.scale or 1.0  # none yet: no term, and every gradient is zero
        backward(loss, hooks.gradient_scale, index)
        hooks.phase = "idle"
        return loss.terms

    def _counted_already(self) -> None:
        """The batch goes through once more: its inputs are counted."""
        self.hooks.phase = "idle"


class _Progress:
    """A bar of this process's samples, with tokens a second."""

    def __init__(self, known: int | None, most: int | None, title: str, show: bool) -> None:
        """``known``: how many there are, None where only reading tells; ``most``: are taken."""
        total = min((each for each in (known, most) if each is not None), default=None)
        if known is None and most is not None:
            title = f"{title}, at most {most} samples"
        self._bar = tqdm(total=total, unit="sample", desc=title, disable=not show)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, samples: int, tokens: int) -> None:
        """So many samples more; ``tokens``: of all so far."""
        self._bar.update(samples)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed:
            self._bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s")

    def end(self, samples: int) -> None:
        self._bar.total = samples


def _check_outputs(model: nn.Module, forward_fn: ForwardFn | None) -> None:
    config = getattr(model, "config", None)
    if forward_fn is None and getattr(config, "return_dict", True) is False:
        raise ValueError(
            "return_dict=False in the model's config; expected True, or a forward_fn(model, batch) "
            "that returns (loss, terms) with loss their mean"
        )


def check_terms(samples: int, terms: int) -> None:
    """An error where the loss has no term: then every gradient is zero, and every energy."""
    if not terms:
        raise ValueError(
            f"no position of the {samples} samples has a label (all labels are {IGNORED}, or stand "
            "where nothing predicts them); expected labels, of 2 tokens or more in a causal model"
        )


_PHASES = {
    "forward": "the forward of batch {}",
    "backward": "the backward of batch {}",
    "probe": "the search for the loss scale of batch {}",
}


def _place(hooks: MomentHooks, index: int, batch: Prepared | None) -> str:
    """Where the pass is, for a message."""
    if hooks.phase not in _PHASES or batch is None:
        return f"the pass after batch {index}" if index >= 0 else "the pass before its first batch"
    tensors = tensors_in(batch.batch)
    ids = next((t for t in tensors if t.dim() > 1 and not t.is_floating_point()), None)
    length = "" if ids is None else f" × {ids.shape[1]} tokens"
    place = _PHASES[hooks.phase].format(index)
    samples = batch.samples
    return f"{place} (counted from 0, {samples} sample{'s' * (samples != 1)}{length})"


def _input_device(model: nn.Module) -> torch.device:
    """Where the batch goes: the device of the first parameter (the embedding's, as a rule)."""
    return next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )
