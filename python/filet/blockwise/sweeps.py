"""The sweeps over the batches and blocks: the blocks' first inputs, forward, reverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena, Gradient
from filet.blockwise.boundaries import Boundaries
from filet.blockwise.journal import Journal
from filet.blockwise.progress import Progress
from filet.blockwise.stream import Groups
from filet.blockwise.work import Taken, Work
from filet.collect.hooks import MomentHooks
from filet.collect.scale import boundary_factor
from filet.model.chain import described
from filet.model.targets import Target
from filet.select import check_rank

__all__ = ["Reverse", "capture", "check_candidates", "forward"]


def capture(
    work: Work, boundaries_of: Callable[[Tensor | None], Boundaries]
) -> tuple[Boundaries, Arena]:
    """The first block's inputs of every batch, and what all blocks are called with.

    The weights that are of no block have to be in the model. ``boundaries_of`` makes room once the
    first batch shows what a boundary is like; None: there is no batch.
    """
    work.calls.clear()
    boundaries: Boundaries | None = None
    arena: Arena | None = None
    for index, batch in enumerate(work.batches):
        hidden, calls = work.model.parts.capture(work.on_device(batch))
        if boundaries is None:
            boundaries = boundaries_of(hidden)
            arena = boundaries.pool.get()
        assert arena is not None
        layout = boundaries.layout
        expected = layout.shapes[index]
        if hidden.shape != expected or hidden.dtype != layout.dtype:
            raise ValueError(
                f"the hidden states of batch {index} are {described(hidden)}; expected "
                f"{layout.dtype} {tuple(expected)}"
            )
        work.calls.append(calls)
        work.copies.store(hidden, arena, index)
    if boundaries is None:
        boundaries = boundaries_of(None)
    return boundaries, arena or boundaries.pool.get()


def forward(
    work: Work, boundaries: Boundaries, arena: Arena, blocks: range, then: Groups
) -> tuple[Arena, dict[str, Tensor]]:
    """Blocks in ascending order; keeps their inputs, of which ``arena`` has the first.

    The weights ``then`` are loaded during the last block.

    Returns:
        The last block's outputs, and the number of candidate directions of each target.
    """
    candidates: dict[str, Tensor] = {}
    progress = work.progress("FILet forward", len(blocks), work.all)
    groups = [work.model.weights[block] for block in blocks]
    with progress, closing(work.stream.loaded(groups)) as loaded:
        start = work.times.clock.now()
        for block, _ in zip(blocks, loaded, strict=True):
            if block == blocks[-1]:
                work.stream.load_ahead(then)
            for name, target in work.model.of_block[block].items():
                candidates[name] = (target.weight != 0).any(0).sum()
            made = _run_forward(work, boundaries, block, arena, progress)
            boundaries.keep(block, arena)
            boundaries.inputs.check()
            arena = made
            start = work.times.took("forward", start)
    return arena, candidates


@torch.no_grad()
def _run_forward(
    work: Work, boundaries: Boundaries, block: int, arena: Arena, progress: Progress
) -> Arena:
    """A block over all batches; returns its outputs."""
    work.place.set(f"the forward of block {block}")
    made = boundaries.get()
    with work.products(block) as start_batch:
        for index, (hidden, *leaves) in work.fetched(block, [arena], work.all):
            start_batch()
            output = work.run(block, index, hidden, leaves)
            work.store(output, made, index)
            progress.advance(block, index)
    return made


def check_candidates(targets: Mapping[str, Target], candidates: Mapping[str, Tensor]) -> None:
    """ValueError for a target whose rank is above the candidate directions found for it."""
    for name, target in targets.items():
        if name in candidates:
            check_rank(target, int(candidates[name]))


class Reverse:
    """Blocks in descending order: moments, energies, A and B; each hands on its gradient."""

    def __init__(self, work: Work, boundaries: Boundaries, journal: Journal) -> None:
        self.work = work
        self.boundaries = boundaries
        self.journal = journal
        self.steps = boundaries.keeping.steps(journal.top)
        self.groups: Groups = [work.model.weights[block] for _, block in self.steps]

    def run(self, gradient: Gradient) -> None:
        """Finish every block, given the gradient of the topmost one's outputs."""
        times, inputs = self.work.times, self.boundaries.inputs
        progress = self.work.progress("FILet reverse", len(self.steps), self.work.all)
        with progress, closing(self.work.stream.loaded(self.groups)) as loaded:
            start = times.clock.now()
            for number in loaded:
                again, block = self.steps[number]
                arena = self.boundaries.take(block)
                if number + 1 < len(self.steps) and self.steps[number + 1][1] != block:
                    inputs.ahead(self.steps[number + 1][1])
                if again:
                    made = _run_forward(self.work, self.boundaries, block, arena, progress)
                    inputs.hold(block, arena)
                    inputs.hold(block + 1, made)
                    start = times.took("recomputed", start)
                    continue
                gradient = self.finish(block, arena, gradient, progress)
                start = times.took("reverse", start)
            with times.waiting("disk"):
                self.journal.finish()

    def finish(self, block: int, inputs: Arena, gradient: Gradient, progress: Progress) -> Gradient:
        """Finish a block, given its inputs and the gradient of its outputs.

        Returns the gradient of its inputs; of the first block that of its outputs, for nobody.
        """
        self.work.place.set(f"the forward and backward of block {block}")
        boundaries, journal = self.boundaries, self.journal
        made = boundaries.get() if block > self.work.model.first else None
        half = boundaries.layout.half
        # What the block below gave may have grown or shrunk.
        factor = boundary_factor(gradient.peak) if half else 1.0
        scale = gradient.scale * factor
        with MomentHooks(self.work.model.of_block[block], self.work.config) as hooks:
            arenas = [inputs, gradient.arena]
            peak = self._over_batches(block, arenas, made, factor, scale, hooks, progress)
            hooks.add_left_out()
        hooks.finish()
        hooks.check_finite("one of the batches")
        taken, unmasked = self.work.taken(block, hooks), set(hooks.unmasked)
        kept = None
        if self.work.keeps:
            hooks_of_keep = self._over_keep(block, inputs, taken, progress)
            kept = self.work.taken_to_keep(taken, hooks_of_keep)
            unmasked |= set(hooks_of_keep.unmasked)
        boundaries.pool.put(inputs)
        largest = self.work.largest(float(peak)) if half else 0.0
        below = None if made is None else Gradient(made, scale, largest)
        statistics = self.work.statistics(block, taken, kept)
        if journal.with_statistics:
            with self.work.times.waiting("disk"):
                journal.save_statistics(block, statistics)
        finished = self.work.finished(block, taken, statistics, unmasked)
        with self.work.times.waiting("processes"):
            journal.save_block(finished)
        journal.release(gradient.arena, boundaries.pool.put)
        if below is None:
            return gradient
        # A disk that is behind does not hold up the computation: until it has caught up, blocks
        # wait to be finished together, by the gradient of the last one's inputs.
        if not journal.is_behind():
            journal.save_gradient(block - 1, below)
        return below

    def _over_batches(
        self,
        block: int,
        arenas: list[Arena],
        made: Arena | None,
        factor: float,
        scale: float,
        hooks: MomentHooks,
        progress: Progress,
    ) -> Tensor:
        """Every batch forward and backward, the gradients of the inputs into ``made``.

        ``arenas``: the block's inputs and the gradients of its outputs, which have to be multiplied
        by ``factor`` to be times ``scale``. Returns the largest number of what is made in float16.
        """
        work, half = self.work, self.boundaries.layout.half
        peak = torch.zeros((), dtype=torch.float32, device=work.device)

        def through(index: int, hidden: Tensor, gradient: Tensor, *leaves: Tensor) -> Tensor:
            gradient = gradient if factor == 1.0 else gradient * factor
            return work.backward(block, index, hidden, gradient, leaves, hooks, scale)

        def again(index: int) -> Tensor:
            return through(index, *work.fetch(block, arenas, index).ready())

        for index, fetched in work.fetched(block, arenas, work.task):
            hidden = through(index, *fetched)
            hooks.note_run(partial(again, index))
            if made is not None:
                assert hidden.grad is not None
                if half:
                    peak = torch.maximum(peak, hidden.grad.abs().amax())
                work.store(hidden.grad, made, index)
            else:
                work.throttle.add_computed()
            progress.advance(block, index)
        return peak

    def _over_keep(
        self, block: int, inputs: Arena, taken: Taken, progress: Progress
    ) -> MomentHooks:
        """The data to keep forward once more, now that the task's moments say in which spaces.

        Moments of the forward sweep would have to be guessed at,
        and kept until here: of a large model they are as large as these inputs.
        """
        work = self.work
        work.place.set(f"the forward of the data to keep in block {block}")

        def again(index: int) -> None:
            hidden, *leaves = work.fetch(block, [inputs], index).ready()
            work.inputs(block, index, hidden, leaves, kept)

        with work.to_keep(block, taken) as kept:
            for index, (hidden, *leaves) in work.fetched(block, [inputs], work.keep):
                work.inputs(block, index, hidden, leaves, kept)
                kept.note_run(partial(again, index))
                work.throttle.add_computed()
                progress.advance(block, index)
            kept.add_left_out()
        kept.finish()
        kept.check_finite("one of the batches to keep")
        return kept
