"""What a blockwise run has finished, in a folder: a run that was killed goes on there.

The folder is written beside the computation. Every file is complete or absent. Of several processes
the first has the folder, and writes everything but the others' gradients.
"""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from filet.blockwise.arenas import Arena, Gradient, Layout
from filet.blockwise.blockfile import Finished
from filet.blockwise.disk import Abandoned
from filet.blockwise.gradients import Gradients
from filet.blockwise.machine import Machine
from filet.blockwise.manifest import compare
from filet.collect.sizes import moment_bytes
from filet.collect.statistics import Statistics
from filet.distributed.group import Group
from filet.model.sample import Sample
from filet.model.targets import Target
from filet.system.files import replaced
from filet.system.lock import FolderLock
from filet.system.text import readable

__all__ = ["Journal"]

_MANIFEST = "manifest.json"


class Journal:
    """The run folder, locked and in use by one run.

    What several processes do with it they do together.

    A context manager. On leaving, the folder is removed if there is nothing in it to go on from, or
    after :meth:`discard`.

    Attributes:
        folder: created on entering, if it is not there.
        top: the block to go on with, in descending order; below ``first`` when all are finished.
        has_gradient: whether the gradient that it needs was in the folder.
        reserved: bytes of disk that the run needs there (:meth:`reserve`).
        with_statistics: whether each block's are kept, to be written in the end.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        first: int,
        number: int,
        machine: Machine,
        with_statistics: bool = False,
        group: Group | None = None,
    ) -> None:
        """``first``: the lowest block to finish, of ``number`` blocks."""
        self._group = group
        self._is_first = group is None or group.rank == 0
        self.with_statistics = with_statistics
        self.folder = folder
        self.top = number - 1
        self.has_gradient = False
        self.reserved = 0
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        self._gradients = Gradients(folder, machine.disk, rank, size)
        self._manifest = manifest
        self._first = first
        self._number = number
        self._disk = machine.disk
        self._lock = FolderLock(folder)
        self._stack = contextlib.ExitStack()
        self._needed = True
        self._threads = machine.writers()
        self._writing: Future[None] | None = None  # the last gradient
        self._last: int | None = None  # whose that is
        self._being_written: Arena | None = None
        self._saved: list[Future[None]] = []  # the files of this run's blocks
        self._useless = threading.Event()  # the gradient that is being written is

    def __enter__(self) -> Journal:
        with contextlib.ExitStack() as stack:
            if self._is_first:
                stack.enter_context(self._lock)
            complete = self._complete()
            if self._is_first:
                self._resume(complete)
                stack.callback(self._leave)
            if self._group is not None:
                self.top, self.has_gradient = self._group.from_first((self.top, self.has_gradient))
            stack.callback(self._threads.shutdown, cancel_futures=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def discard(self) -> None:
        """Have the folder removed on leaving, while it is locked: the adapter is there."""
        self._needed = False

    def _leave(self) -> None:
        complete = self._gradients.complete()
        begun = self._finished_before(self._next_block(complete), complete)
        if self._group is not None:  # another process may be about to complete what is there
            begun = begun or bool(self._gradients.blocks())
        if not self._needed or not begun:
            self._lock.remove()  # there is nothing to go on from

    # What is there.

    def load_gradient(self, arena: Arena, layout: Layout) -> Gradient:
        """The gradient with respect to block ``top``'s outputs, into ``arena`` of that layout."""
        return self._gradients.load(self.top, arena, layout)

    def finished(self) -> Iterator[Finished]:
        """All blocks in descending order, from their files."""
        for block in range(self._number - 1, self._first - 1, -1):
            yield Finished.load(self._block_file(block), block)

    def statistics(self) -> list[Statistics]:
        """Of all blocks in ascending order. Their numbers stay in the files until they are read."""
        blocks = range(self._first, self._number)
        return [Statistics.load(self._statistics_file(block)) for block in blocks]

    def _complete(self) -> Set[int]:
        """The blocks of whose outputs all processes find all gradients, in the locked folder."""
        if self._group is None:
            return self._gradients.complete()
        self._group.settle()  # the folder is there, and the first process has it
        return set.intersection(*self._group.exchanged(self._gradients.complete()))

    def _resume(self, complete: Set[int]) -> None:
        """Check that the folder is of this run, or begin one; find the block to go on with."""
        path = self.folder / _MANIFEST
        for left in self.folder.glob(".*"):  # by a kill while a file was written
            left.unlink()
        if not path.is_file():
            # A process may have gone on writing when the first one had given the folder up.
            self._gradients.unlink()
            complete = set()
        others = [each for each in self.folder.iterdir() if each.name != "lock"]
        if others and not path.is_file():
            raise ValueError(f"{self.folder} is there, but no run of filet; expected no folder")
        self.top = self._next_block(complete)
        self.has_gradient = self.top in complete
        if self._finished_before(self.top, complete):
            compare(json.loads(path.read_text()), self._manifest, self.folder)
        else:
            with replaced(path, durable=True) as beside:
                beside.write_text(json.dumps(self._manifest, indent=1))
        for block in self._blocks():
            if block <= self.top:  # not finished: its gradient never came
                self._block_file(block).unlink()
        self._gradients.unlink(lambda block: block != self.top)

    def _blocks(self) -> set[int]:
        """Those that there is a file of."""
        return {int(each.stem.rpartition("-")[2]) for each in self.folder.glob("block-*")}

    def _next_block(self, complete: Set[int]) -> int:
        """Of the reverse sweep: the first that is not finished.

        Blocks are finished, those above them too, when their files are there and the gradient that
        the next one needs; or when the files of all are.
        """
        there, lowest = self._blocks(), self._number
        while lowest - 1 in there:
            lowest -= 1
        if lowest <= self._first:
            return self._first - 1
        return min((block for block in complete if block + 1 >= lowest), default=self._number - 1)

    def _finished_before(self, block: int, complete: Set[int]) -> bool:
        """Whether there is something to go on from at this block: at least the head's gradient."""
        return block < self._number - 1 or block in complete

    def _block_file(self, block: int) -> Path:
        return self.folder / f"block-{block}.safetensors"

    def _statistics_file(self, block: int) -> Path:
        return self.folder / f"statistics-{block}.safetensors"

    # What comes in, written beside the computation.

    def reserve(
        self,
        layout: Layout,
        batches: Sequence[Sequence[Sample]],
        of_block: Sequence[dict[str, Target]],
        with_B: bool,
        keep: bool,
    ) -> None:
        """See that the disk has what the run will need, for gradients of these samples.

        ``with_B``: whether blocks have B beside A. ``keep``: whether statistics have moments of
        data to keep. Raises OSError where the disk has less.
        """
        self._gradients.describe(layout, batches)
        gradients = self._gradients.nbytes
        if self._group is not None:
            gradients = self._group.summed({"gradients": gradients})["gradients"]
        # Two gradients at a time, and A, B and the energies of what is not finished.
        shapes = [
            (target.rank, *target.shape)
            for mine in of_block[self._first : self.top + 1]
            for target in mine.values()
        ]
        self.reserved = 2 * gradients + sum(
            4 * rank * (m + n if with_B else n) + 8 * n for rank, m, n in shapes
        )
        if self.with_statistics:  # at most: who shares an input shows only when they are taken
            for mine in of_block[self._first : self.top + 1]:
                self.reserved += sum(map(sum, moment_bytes(mine, {}, keep).values()))
        free = self._disk.free(self.folder)
        if self._is_first and free < self.reserved:
            text = f"{readable(self.reserved)} needed, {readable(free)} free"
            raise OSError(errno.ENOSPC, text, str(self.folder))

    def save_block(self, finished: Finished) -> None:
        """Begin to write a block's file, of what each process chose."""
        others: Sequence[Tensor] = ()
        if self._group is not None:
            others = self._group.gathered(b"" if self._is_first else finished.content())
        if self._is_first:
            self._saved.append(self._threads.submit(self._write_block, finished, others))

    def save_statistics(self, block: int, statistics: Statistics) -> None:
        """Write a block's statistics, before its file. At once: they hold the device's memory."""
        whole = statistics.whole()
        if whole is not None:
            with replaced(self._statistics_file(block), durable=True) as beside:
                whole.save(beside)

    def save_gradient(self, block: int, gradient: Gradient) -> None:
        """Begin to write what ``block`` needs to go on, where nobody :meth:`is_behind`.

        Its arena is read for that; :meth:`release` says until when. With this file, and those of
        the other processes, the blocks above are finished, so it comes after theirs.
        """
        if self._group is not None and self._last is not None:
            # Only now is it known that all processes have the one before, and who needs no older.
            last = self._last
            self._gradients.unlink(lambda its: its > last)
        self._last = block
        self._being_written = gradient.arena
        above = list(self._saved)
        self._writing = self._threads.submit(self._write_gradient, block, gradient, above)

    def is_behind(self) -> bool:
        """Whether a gradient is still being written; raises what went wrong with any file."""
        for each in [*self._saved, *([] if self._writing is None else [self._writing])]:
            if each.done():
                each.result()
        behind = self._writing is not None and not self._writing.done()
        return behind if self._group is None else any(self._group.exchanged(behind))

    def release(self, arena: Arena, put: Callable[[Arena], None]) -> None:
        """``put`` the arena back as soon as no gradient is being written from it."""
        if arena is self._being_written:
            assert self._writing is not None
            self._writing.add_done_callback(lambda _: put(arena))
        else:
            put(arena)

    def settle(self) -> None:
        """Wait until no gradient is being written, whatever becomes of it."""
        if self._writing is not None:
            self._writing.exception()

    def finish(self) -> None:
        """All blocks are done: wait for their files.

        The gradient that is being written is useless. It is given up at the next piece.
        """
        self._useless.set()
        if self._writing is not None:
            with contextlib.suppress(Abandoned):
                self._writing.result()
        for each in self._saved:
            each.result()
        if self._group is not None:
            self._group.settle()  # nobody writes any more, and the files of all blocks are there
        self._gradients.unlink()

    def _write_block(self, finished: Finished, others: Sequence[Tensor]) -> None:
        with replaced(self._block_file(finished.block), durable=True) as beside:
            whole = finished.with_others(others)
            self._disk.save(beside, memoryview(whole.content()))

    def _write_gradient(
        self, block: int, gradient: Gradient, above: Sequence[Future[None]]
    ) -> None:
        with replaced(self._gradients.path(block), durable=True) as beside:
            self._gradients.save(beside, gradient, self._useless)
            for each in above:
                each.result()
        if self._group is None:
            self._gradients.unlink(lambda its: its > block)
