"""The inputs of blocks between the sweeps, in host memory or on disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filet.blockwise.arenas import Arena, ArenaPool
from filet.blockwise.disk import Disk

__all__ = ["BlockInputs"]

# Of an arena, so much is written and read to see how fast the scratch disk is.
_PROBE = 2**28


class BlockInputs:
    """The inputs of blocks that the reverse sweep will ask for, in host memory or on disk.

    On disk past the page cache: they may be larger than the memory, are read once, and would take
    the place of the shards. And how long a disk takes can be told beforehand.
    """

    def __init__(self, pool: ArenaPool, folder: Path | None, disk: Disk) -> None:
        self.folder = folder
        self._pool = pool
        self._disk = disk
        self._direct = folder is not None and disk.takes_direct(folder)
        self._held: dict[int, Arena] = {}
        self._written: dict[int, Future[None]] = {}
        self._coming: dict[int, Future[Arena]] = {}
        self._thread = ThreadPoolExecutor(1, "filet scratch")

    def hold(self, block: int, arena: Arena) -> None:
        """Keep them where they are."""
        self._held[block] = arena

    def write(self, block: int, arena: Arena) -> Future[None]:
        """Begin to write them to disk; the arena may be used again when that is done."""
        written = self._thread.submit(
            arena.save, self._disk, self._path(block), direct=self._direct
        )
        self._written[block] = written
        return written

    def speed(self, arena: Arena) -> tuple[float, float]:
        """Seconds to write a block's inputs to disk, and to read them; measured on a part."""
        path = self._path_of("speed.raw")
        arena.wait_written()
        part = arena.bytes()[:_PROBE]
        times = [time.perf_counter()]
        self._disk.save(path, part, direct=self._direct)
        times.append(time.perf_counter())
        self._disk.load(path, part, direct=self._direct)  # the same bytes
        times.append(time.perf_counter())
        path.unlink()
        share = arena.buffer.numel() / len(part)
        return (times[1] - times[0]) * share, (times[2] - times[1]) * share

    def ahead(self, block: int) -> None:
        """Begin to read them, if they are on disk."""
        if block in self._written and block not in self._coming:
            self._coming[block] = self._thread.submit(self._read, block)

    def take(self, block: int) -> Arena:
        """The arena with a block's inputs, now the caller's."""
        if block in self._held:
            return self._held.pop(block)
        self.ahead(block)
        arena = self._coming.pop(block).result()
        del self._written[block]
        return arena

    def check(self) -> None:
        """Raise what went wrong in writing so far."""
        for written in self._written.values():
            if written.done():
                written.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _path(self, block: int) -> Path:
        return self._path_of(f"inputs-{block}.raw")

    def _path_of(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _read(self, block: int) -> Arena:
        self._written[block].result()
        arena = self._pool.get()
        arena.load(self._disk, self._path(block), direct=self._direct)
        self._path(block).unlink()
        return arena
