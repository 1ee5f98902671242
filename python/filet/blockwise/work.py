"""A block and a batch: what every sweep does with them, and what it does that with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena
from filet.blockwise.batches import Batch
from filet.blockwise.blockfile import Finished
from filet.blockwise.copies import Copies, Fetched, Throttle
from filet.blockwise.parted import PartedModel
from filet.blockwise.progress import Progress, Times, UnderWay
from filet.blockwise.stream import WeightStream
from filet.collect.hooks import MomentHooks
from filet.collect.keep import hooks_to_keep, with_unseen
from filet.collect.statistics import Statistics, moments_of_all, settings_of
from filet.collect.together import Together, columns_of, holders_by_cost
from filet.collect.unrounded import hands_on
from filet.config import FiletConfig
from filet.distributed.group import Group
from filet.model.chain import Calls
from filet.model.fingerprint import fingerprints_of
from filet.model.targets import Target
from filet.select import Divided, choose
from filet_kernels import Moments, SecondMoment

__all__ = ["Taken", "Work"]


@dataclass(frozen=True)
class Taken:
    """The moments of the task in a block, and whose input each module shares."""

    moments: dict[str, Moments]
    shared_input: dict[str, str]
    together: Together | None  # of several processes

    @property
    def owners(self) -> dict[str, int] | None:
        """Who has which sums; None: all are here."""
        return None if self.together is None else self.together.owners


class Work:
    """The model, its batches, and the ways of weights and boundaries to the device.

    Attributes:
        batches: this process's, of the task, and then of the data to keep, if there is any.
        all, task, keep: which of them are which.
        counts, keep_counts: of the task, and of the data to keep; of all processes.
        group: the processes, None for this one alone.
        calls: what the blocks are called with for each batch; the first sweep finds it.
    """

    def __init__(
        self,
        model: PartedModel,
        task: tuple[Sequence[Batch], dict[str, int]],
        keep: tuple[Sequence[Batch], dict[str, int]],
        config: FiletConfig,
        stream: WeightStream,
        times: Times,
        show: bool,
        group: Group | None = None,
        whole: bool = False,
    ) -> None:
        """``task``, ``keep``: batches and counts. ``whole``: statistics are for a file as well."""
        self.model = model
        of_task, self.counts = task
        of_keep, self.keep_counts = keep
        self.batches = [*of_task, *of_keep]
        self.all = range(len(self.batches))
        self.task, self.keep = self.all[: len(of_task)], self.all[len(of_task) :]
        self.group = group
        self.config = config
        self.stream = stream
        self.device = stream.device
        self.times = times
        self.show = show
        self.place = UnderWay("the blocks' first inputs")
        self._whole = whole
        self.masks = [None if b.mask is None else b.mask.to(self.device) for b in self.batches]
        self.calls: list[Calls] = []
        self.copies = Copies(self.device)
        self.throttle = Throttle(self.device)

    @property
    def kept(self) -> dict[str, Any]:
        """Of data to keep, for a report; empty without."""
        counts: dict[str, Any] = {name: self.keep_counts[name] for name in ("samples", "tokens")}
        return {**counts, "from": "batches"} if counts["samples"] else {}

    def progress(self, what: str, blocks: int, batches: range) -> Progress:
        """Of ``batches`` through ``blocks``."""
        of, steps = self.model.number, len(batches)
        what = what if self.group is None else f"{self.group}: {what}"
        return Progress(what, blocks, of, self.batches, steps, self.device, self.show)

    def on_device(self, batch: Batch) -> dict[str, Any]:
        return {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.inputs.items()
        }

    def fetch(self, block: int, arenas: Sequence[Arena], index: int) -> Fetched:
        """A batch's tensors on their way to the device: the arenas', and the block's leaves."""
        return self.copies.fetch(arenas, index, self.calls[index].of(block))

    def fetched(
        self, block: int, arenas: Sequence[Arena], batches: range
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """The tensors of these batches on the device, as of :meth:`fetch`; one ahead."""
        coming = self.fetch(block, arenas, batches[0]) if batches else None
        for index in batches:
            assert coming is not None
            now = coming
            more = index + 1 in batches
            coming = self.fetch(block, arenas, index + 1) if more else None
            yield index, now.ready()

    def store(self, value: Tensor, arena: Arena, index: int) -> None:
        self.throttle.add(self.copies.store(value, arena, index))

    def run(self, block: int, index: int, hidden: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """A block's output for a batch."""
        return self.model.parts.run_block(block, hidden, self.calls[index], leaves)

    @contextlib.contextmanager
    def products(self, block: int) -> Iterator[Callable[[], None]]:
        """The forward runs by the products that the reverse sweep will run it by.

        Gives what is to be called before each batch.

        On a GPU the hooks that count form some outputs in float32 and round them themselves. A
        rounding apart, the router of a mixture of experts would choose others now and then.
        """
        if not hands_on(self.device):
            yield lambda: None
            return
        with MomentHooks(self.model.of_block[block], self.config) as hooks:
            hooks.counting = False
            hooks.phase = "forward"
            yield lambda: hooks.start_batch({})

    def backward(
        self,
        block: int,
        index: int,
        hidden: Tensor,
        gradient: Tensor,
        leaves: Sequence[Tensor],
        hooks: MomentHooks,
        scale: float,
    ) -> Tensor:
        """Recompute a block for a batch, and back; returns ``hidden``, which has its gradient.

        ``gradient`` is of the block's output, times ``scale``.
        """
        hooks.start_batch({"decoder": self.masks[index]})
        hooks.phase = "forward"
        hidden = hidden.requires_grad_()
        output = self.run(block, index, hidden, leaves)
        hooks.phase = "backward"
        hooks.gradient_scale = scale
        output.backward(gradient)
        hooks.phase = "idle"
        hooks.check_sharing(index)
        return hidden

    @property
    def keeps(self) -> bool:
        """Whether there is data to keep; this process may have none of it."""
        return self.keep_counts["samples"] > 0

    def largest(self, value: float) -> float:
        """Of what each process gave. Collective."""
        return value if self.group is None else max(self.group.exchanged(value))

    def to_keep(self, block: int, taken: Taken) -> MomentHooks:
        """Hooks for the data to keep, given what was taken of the task."""
        targets = self.model.of_block[block]
        return hooks_to_keep(targets, targets, self.config, taken.moments, taken.shared_input)

    @torch.no_grad()
    def inputs(
        self, block: int, index: int, hidden: Tensor, leaves: Sequence[Tensor], hooks: MomentHooks
    ) -> None:
        """A block's forward for a batch of data to keep, for the moments of its targets' inputs."""
        hooks.start_batch({"decoder": self.masks[index]})
        hooks.phase = "forward"
        self.run(block, index, hidden, leaves)
        hooks.phase = "idle"
        hooks.check_sharing(index)

    def taken(self, block: int, hooks: MomentHooks) -> Taken:
        """The task's moments in a block, of all processes; the hooks are finished."""
        targets, terms = self.model.of_block[block], self.counts["loss_terms"]
        moments, shared, together = dict(hooks.moments), hooks.shared_input, None
        if self.group is not None:
            contrast = self.config.select == "contrast"
            holders = partial(holders_by_cost, self.group, contrast=contrast)
            with self.times.waiting("processes"):
                together = Together(self.group, targets, holders)
                moments, shared = together.moments(targets, moments, shared, terms)
        for its in moments.values():
            its.loss_terms.fill_(terms)
        moments = moments_of_all(targets, moments, terms, "cpu")
        return Taken(moments, shared, together)

    def taken_to_keep(self, taken: Taken, hooks: MomentHooks) -> dict[str, SecondMoment]:
        """The inputs' moments on data to keep, of all processes; the hooks are finished."""
        inputs = {name: its.input for name, its in hooks.moments.items()}
        if taken.together is not None:
            with self.times.waiting("processes"):
                inputs = taken.together.inputs(inputs, taken.shared_input)
        return with_unseen(inputs, taken.moments)

    def statistics(
        self, block: int, taken: Taken, keep: dict[str, SecondMoment] | None
    ) -> Statistics:
        """Of a block, with the hashes of the weights that this process needs."""
        counts, targets = self.counts, self.model.of_block[block]
        hashed = targets if self._whole else self._mine(block, taken.owners)
        return Statistics(
            taken.moments,
            fingerprints_of({name: target.values for name, target in hashed.items()}),
            taken.shared_input,
            samples=counts["samples"],
            tokens=counts["tokens"],
            loss_terms=counts["loss_terms"],
            data=counts["data"],
            fisher=self.config.fisher,
            settings=settings_of(self.config),
            keep=keep,
            keep_samples=self.keep_counts["samples"],
            keep_tokens=self.keep_counts["tokens"],
            keep_from=self.kept.get("from", ""),
            owners=taken.owners,
        )

    def _mine(self, block: int, owners: Mapping[str, int] | None) -> dict[str, Target]:
        """The targets of a block that this process chooses for."""
        targets = self.model.of_block[block]
        if self.group is None or owners is None:
            return targets
        return {name: t for name, t in targets.items() if owners[name] == self.group.rank}

    def _divided(self, block: int, together: Together | None) -> Divided | None:
        """The modules of a block whose energies more processes than their owner compute."""
        if together is None:
            return None
        targets = self.model.of_block[block]
        several = {name: its for name, its in together.holders.items() if its[1:]}
        columns = {name: columns_of(its, targets[name].shape[1]) for name, its in several.items()}
        return Divided(together.group, targets, columns) if several else None

    def finished(
        self, block: int, taken: Taken, statistics: Statistics, unmasked: Iterable[str]
    ) -> Finished:
        """A, B, energies and choices of a block; those that are this process's."""
        choice = choose(
            self._mine(block, statistics.owners),
            statistics.moments,
            statistics.shared_input,
            statistics.fingerprints,
            self.config,
            statistics.keep,
            divided=self._divided(block, taken.together),
        )
        for layer in choice.layers.values():
            layer.A0 = layer.A0.cpu()
            layer.B0 = None if layer.B0 is None else layer.B0.cpu()
        return Finished(block, choice, sorted(unmasked))
