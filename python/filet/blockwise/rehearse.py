"""What is timed and measured before the run, to refuse early and to plan.

One block and the head run on the largest batch, of the task and of data to keep; what all batches
take is extrapolated from it.
"""

from __future__ import annotations

import contextlib
import itertools
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena
from filet.blockwise.boundaries import Boundaries
from filet.blockwise.disk import Disk
from filet.blockwise.division import size_of
from filet.blockwise.head import HEAD, loss_gradient
from filet.blockwise.journal import Journal
from filet.blockwise.machine import PeakMemory
from filet.blockwise.plan import RunPlan
from filet.blockwise.stream import whole_bytes
from filet.blockwise.work import Work
from filet.collect.hooks import MomentHooks

__all__ = ["Measured", "Rehearsal", "disk_seconds", "plan_of"]

# What is timed before the run is done so often; the first time compiles and sets up.
_ROUNDS = 2

# Batches that a GPU is timed on: of one alone, much would be the launch of its first kernels.
_TIMED = 4


@dataclass(frozen=True)
class Measured:
    """Of one part of the model, on all batches: seconds, and peaks of the GPU's memory in bytes."""

    loading: float = 0.0
    forward: float = 0.0
    reverse: float = 0.0
    forward_bytes: int = 0
    reverse_bytes: int = 0


@dataclass(frozen=True)
class _Largest:
    """Of some batches the largest, which is run for all of them."""

    index: int
    shape: str
    timed: int  # how often it is run at a time
    share: float  # all their positions over those of one such run

    @classmethod
    def of(cls, work: Work, batches: range) -> _Largest:
        sizes = [work.batches[index].positions for index in batches]
        if not sizes:  # a process without samples
            return cls(-1, "no", 0, 0.0)
        index = batches[sizes.index(max(sizes))]
        shape = "×".join(map(str, work.batches[index].inputs["input_ids"].shape))
        timed = min(_TIMED, len(sizes)) if work.device.type == "cuda" else 1
        return cls(index, shape, timed, sum(sizes) / max(sizes) / timed)


class Rehearsal:
    """Runs parts of the model on the largest batch, and measures them."""

    def __init__(self, work: Work, boundaries: Boundaries, memory: PeakMemory) -> None:
        self.work = work
        self.boundaries = boundaries
        self.memory = memory
        self.all, self.task = _Largest.of(work, work.all), _Largest.of(work, work.task)
        self.keep = _Largest.of(work, work.keep) if work.keeps else None

    def head(self, arena: Arena) -> float:
        """Seconds that the head takes for all batches; its weights have to be in the model."""
        work, largest = self.work, self.task
        work.place.set(HEAD)
        seconds, gradient = 0.0, None
        with self.boundaries.pool.paused():
            for _ in range(_ROUNDS):
                start = self._clock()
                for _ in range(largest.timed):
                    (rows,) = work.copies.fetch([arena], largest.index, []).ready()
                    # Held while the next is computed, as in the sweep: the peak memory counts.
                    gradient = loss_gradient(work, work.batches[largest.index], rows, 1.0)
                seconds = self._clock() - start
        del gradient
        return seconds * largest.share

    def block(self, arena: Arena) -> Measured:
        """Of the first block with targets, on the first block's inputs, ``arena``."""
        model, stream, block = self.work.model, self.work.stream, self.work.model.first
        shape = self.task.shape if self.keep is None else f"{self.task.shape} and {self.keep.shape}"
        self.work.place.set(f"the rehearsal of block {block} on the largest batch, {shape} tokens")
        # After another block: setting up the thread and its buffers is no part of loading.
        groups = [model.weights[model.number - 1], model.weights[block]]
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(closing(stream.loaded(groups)))
            next(loaded), next(loaded)
            loading = stream.loading
            stack.enter_context(self.boundaries.pool.paused())
            for _ in range(_ROUNDS):
                times, forward_bytes = self._round(block, arena)
        forward, begin, reverse, finish, kept, choice = (
            b - a for a, b in itertools.pairwise(times)
        )
        task = begin + (self.task.share - 1 / max(1, self.task.timed)) * reverse + finish
        return Measured(
            loading,
            forward * self.all.share,
            task + kept * (0 if self.keep is None else self.keep.share) + choice,
            forward_bytes,
            self.memory.reset(),
        )

    def _round(self, block: int, arena: Arena) -> tuple[list[float], int]:
        """One block, and its A and B chosen.

        Forward, back for the first time, back again, moments finished, forward with data to keep.
        Returns the times around these, and the peak memory of the forward.
        """
        work = self.work

        def fetched(largest: _Largest) -> list[Tensor]:
            return work.fetch(block, [arena], largest.index).ready()

        def back(hooks: MomentHooks) -> None:
            hidden, *leaves = fetched(self.task)
            gradient = torch.full_like(hidden, 2**-6)
            work.backward(block, self.task.index, hidden, gradient, leaves, hooks, 1.0)

        times = [self._clock()]
        self.memory.reset()
        with torch.no_grad(), work.products(block) as start_batch:
            for _ in range(self.all.timed):
                start_batch()
                hidden, *leaves = fetched(self.all)
                work.run(block, self.all.index, hidden, leaves)
        times.append(self._clock())
        forward_bytes = self.memory.reset()
        with MomentHooks(work.model.of_block[block], work.config) as hooks:
            if self.task.timed:
                back(hooks)  # which also makes the moments
            times.append(self._clock())
            for _ in range(self.task.timed):
                back(hooks)
        times.append(self._clock())
        hooks.finish()
        hooks.check_finite(f"batch {self.task.index} (counted from 0)")
        times.append(self._clock())
        taken, kept = work.taken(block, hooks), None
        if self.keep is not None:
            with work.to_keep(block, taken) as of_keep:
                for _ in range(self.keep.timed):
                    hidden, *leaves = fetched(self.keep)
                    work.inputs(block, self.keep.index, hidden, leaves, of_keep)
            of_keep.finish()
            kept = work.taken_to_keep(taken, of_keep)
            del of_keep
        times.append(self._clock())
        work.finished(block, taken, work.statistics(block, taken, kept), ())
        del hooks, taken, kept
        times.append(self._clock())
        return times, forward_bytes

    def _clock(self) -> float:
        return self.work.times.clock.settled(self.work.device)


def plan_of(
    work: Work,
    boundaries: Boundaries,
    journal: Journal,
    block: Measured,
    head: Measured,
    on_disk: tuple[float, float],
) -> RunPlan:
    """The plan of a run.

    Args:
        block, head: as measured; the head in ``forward``.
        on_disk: seconds as of :func:`disk_seconds`.
    """
    resumed, keeping = journal.has_gradient, boundaries.keeping
    backs = journal.top - work.model.first + 1
    forwards = journal.top + (0 if resumed else 1)
    again = len(keeping.steps(journal.top)) - backs
    forward, reverse = (max(each, block.loading) for each in (block.forward, block.reverse))
    device_bytes = _device_bytes(work, boundaries, block, head, resumed)
    write_seconds, read_seconds = on_disk
    return RunPlan(
        blocks=(forwards, backs),
        of=work.model.number,
        stride=keeping.stride,
        kept=len(keeping.kept),
        recomputed=again,
        on_disk=len(keeping.on_disk),
        device=torch.cuda.get_device_name(work.device) if device_bytes else "cpu",
        device_bytes=device_bytes,
        host_bytes=keeping.arenas * boundaries.layout.nbytes
        + sum(leaf.nbytes for calls in work.calls for leaf in calls.leaves),
        scratch_bytes=len(keeping.on_disk) * boundaries.layout.nbytes,
        run_bytes=journal.reserved,
        seconds={
            # Nothing hides the loading of the first block; arenas or a disk may take longer.
            "forward": max(
                block.loading + forwards * forward,
                boundaries.pool.seconds_left(),
                write_seconds,
            ),
            "head": head.forward,
            "reverse": max(block.loading + backs * reverse + again * forward, read_seconds),
        },
    )


def _device_bytes(
    work: Work, boundaries: Boundaries, block: Measured, head: Measured, resumed: bool
) -> int:
    """The GPU's peak, 0 on a CPU."""
    if work.device.type != "cuda":
        return 0
    model, layout = work.model, boundaries.layout
    of_block = [size_of(weights) for weights in model.weights]
    # Two places for blocks, beside what the next sweep begins with; and what is on its way in and
    # out. Measured was with places for the last block and the first with targets, which were there.
    places = 2 * max(of_block)
    largest = max((s.numel() for s in layout.shapes), default=0) * layout.dtype.itemsize
    more = places - 2 * max(of_block[-1], of_block[model.first]) + 4 * largest
    # A weight to be quantised has a place before, and then two copies: in 16 bits, and packed.
    whole = max(map(whole_bytes, model.weights))
    copies = 3 * whole // 2
    then = places + whole if resumed else size_of(model.others)
    return max(
        block.forward_bytes + more + copies + then,
        0 if resumed else head.forward_bytes + places + whole + copies,
        block.reverse_bytes + more + copies,
    )


def disk_seconds(
    boundaries: Boundaries, arena: Arena, journal: Journal, disk: Disk
) -> tuple[float, float]:
    """To write the inputs that go to the scratch folder, and to read them; ``arena`` has values."""
    inputs, number = boundaries.inputs, len(boundaries.keeping.on_disk)
    if not number:
        return 0.0, 0.0
    assert inputs.folder is not None
    write, read = (number * seconds for seconds in inputs.speed(arena))
    # Where the inputs are waited for, as many gradients are written meanwhile.
    gradients = write * boundaries.layout.of_gradients / boundaries.layout.nbytes
    return write, read + (gradients if disk.is_one(inputs.folder, journal.folder) else 0.0)
