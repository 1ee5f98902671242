"""A block and a batch: what every sweep does with them, and what it does that with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena
from filet.blockwise.batches import Batch, counts_of
from filet.blockwise.blockfile import Finished
from filet.blockwise.copies import Copies, Fetched, Throttle
from filet.blockwise.parted import PartedModel
from filet.blockwise.progress import Progress, Times, UnderWay
from filet.blockwise.stream import WeightStream
from filet.collect.hooks import MomentHooks
from filet.collect.keep import hooks_to_keep, with_unseen
from filet.collect.statistics import Statistics, moments_of_all
from filet.collect.unrounded import hands_on
from filet.config import FiletConfig
from filet.model.chain import Calls
from filet.model.fingerprint import fingerprints_of
from filet.select import choose

__all__ = ["Work"]


class Work:
    """The model, its batches, and the ways of weights and boundaries to the device.

    Attributes:
        batches: of the task, and then of the data to keep, if there is any.
        all, task, keep: which of them are which.
        counts, keep_counts: of the task, and of the data to keep.
        calls: what the blocks are called with for each batch; the first sweep finds it.
    """

    def __init__(
        self,
        model: PartedModel,
        task: Sequence[Batch],
        keep: Sequence[Batch],
        config: FiletConfig,
        stream: WeightStream,
        times: Times,
        show: bool,
    ) -> None:
        self.model = model
        self.batches = [*task, *keep]
        self.all = range(len(self.batches))
        self.task, self.keep = self.all[: len(task)], self.all[len(task) :]
        self.config = config
        self.stream = stream
        self.device = stream.device
        self.times = times
        self.show = show
        self.place = UnderWay("the blocks' first inputs")
        self.counts = counts_of(task)
        self.keep_counts = counts_of(keep)
        self.masks = [None if b.mask is None else b.mask.to(self.device) for b in self.batches]
        self.calls: list[Calls] = []
        self.copies = Copies(self.device)
        self.throttle = Throttle(self.device)

    def progress(self, what: str, blocks: int, batches: range) -> Progress:
        """Of ``batches`` through ``blocks``."""
        of, steps = self.model.number, len(batches)
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
        coming: Fetched | None = self.fetch(block, arenas, batches[0])
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

    def to_keep(self, block: int, hooks: MomentHooks) -> MomentHooks:
        """Hooks for the data to keep, given those that are finished with the task."""
        targets = self.model.of_block[block]
        return hooks_to_keep(targets, targets, self.config, hooks.moments, hooks.shared_input)

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

    def statistics(self, block: int, hooks: MomentHooks, kept: MomentHooks | None) -> Statistics:
        """Of a block, given its hooks and those of :meth:`to_keep`, all of them finished."""
        counts, targets = self.counts, self.model.of_block[block]
        for its in hooks.moments.values():
            its.loss_terms.fill_(counts["loss_terms"])
        moments = moments_of_all(targets, dict(hooks.moments), counts["loss_terms"], "cpu")
        keep = None
        if kept is not None:
            keep = with_unseen({name: its.input for name, its in kept.moments.items()}, moments)
        return Statistics(
            moments,
            fingerprints_of({name: target.values for name, target in targets.items()}),
            hooks.shared_input,
            samples=counts["samples"],
            tokens=counts["tokens"],
            loss_terms=counts["loss_terms"],
            fisher=self.config.fisher,
            keep=keep,
            keep_samples=self.keep_counts["samples"],
            keep_tokens=self.keep_counts["tokens"],
        )

    def finished(self, block: int, statistics: Statistics, unmasked: Iterable[str]) -> Finished:
        """A, B, energies and choices of a block."""
        choice = choose(
            self.model.of_block[block],
            statistics.moments,
            statistics.shared_input,
            statistics.fingerprints,
            self.config,
            statistics.keep,
        )
        for layer in choice.layers.values():
            layer.A0 = layer.A0.cpu()
            layer.B0 = None if layer.B0 is None else layer.B0.cpu()
        return Finished(block, choice, sorted(unmasked))
