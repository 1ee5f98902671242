"""Block inputs and boundary gradients outside the device: in host memory and on disk.

An arena is host memory for the values of one boundary between blocks: one tensor for each batch.
On a GPU it is pinned, and copies to and from it run on streams of their own beside the computation.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from filet.system.files import read_at

__all__ = ["Abandoned", "Arena", "ArenaPool", "BlockInputs", "Copies", "Fetched", "Layout"]

_ALIGNMENT = 4096


# What goes to a file at a time. Synced each where that can be abandoned: the sync of all of it at
# the end could not.
_PIECE = 2**25


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


# Of an arena, so much is written and read to see how fast the scratch disk is.
_PROBE = 2**28


# Threads that make arenas: one touches the pages of its own while another locks them.
_MAKERS = 2


class Abandoned(Exception):
    """A file was not written to the end, as was asked for."""


class Layout:
    """Where each batch's tensor lies in an arena."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        self.shapes = list(shapes)
        self.dtype = dtype
        self.offsets: list[int] = []
        self.nbytes = 0
        for shape in self.shapes:
            self.offsets.append(self.nbytes)
            size = shape.numel() * dtype.itemsize
            self.nbytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + shape.numel() * self.dtype.itemsize]
            .view(self.dtype)
            .view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]


class Arena:
    """Host memory for one tensor a batch, and the events of the copies that use it."""

    def __init__(self, layout: Layout, pinned: bool) -> None:
        self._pinned = False
        # Whole pages: what goes past the page cache has to begin with one.
        memory = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # In pages of 2 MiB there is less to touch and to lock. A wish: not all kernels can.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8)
        if pinned:
            # Touched by all threads first: pinning alone would do that with one. Not the pinned
            # allocator of torch: it rounds up to a power of two.
            self.buffer.zero_()
            pointer, size = self.buffer.data_ptr(), self.buffer.numel()
            _check(torch.cuda.cudart().cudaHostRegister(pointer, size, 0), size)
            self._pinned = True
        self.views = layout.views(self.buffer)
        self.written: list[Any] = [None] * len(self.views)  # events: the tensor has arrived
        self.read: Any = None  # event: everything that was to be read from here has been

    def wait_written(self) -> None:
        for event in self.written:
            if event is not None:
                event.synchronize()

    def load(self, path: Path, trailer: int = 0, *, direct: bool = False) -> bytes:
        """Fill it from a file; returns the bytes that follow, of which there are ``trailer``.

        ``direct``: past the page cache.
        """
        if self.read is not None:
            self.read.synchronize()
        self.wait_written()
        self.written = [None] * len(self.views)
        with _opened(path, os.O_RDONLY, direct) as file:
            size = os.fstat(file).st_size
            if size != self.buffer.numel() + trailer:
                raise ValueError(
                    f"{path} has {size} bytes; expected {self.buffer.numel() + trailer}"
                )
            read_at(file, path, self._bytes(), 0)
            return os.pread(file, trailer, self.buffer.numel())

    def save(
        self,
        path: Path,
        trailer: bytes = b"",
        abandon: threading.Event | None = None,
        *,
        direct: bool = False,
    ) -> None:
        """Write it to a file; :class:`Abandoned` soon after ``abandon`` is set.

        ``direct``: past the page cache.
        """
        self.wait_written()
        with _opened(path, _WRITE, direct) as file:
            for piece in _pieces(self._bytes()):
                if abandon is not None and abandon.is_set():
                    raise Abandoned
                _write(file, piece)
                if abandon is not None:
                    os.fdatasync(file)
            os.write(file, trailer)

    def speed(self, path: Path, *, direct: bool) -> tuple[float, float]:
        """Seconds to write all of it to a file, and to read it; measured on a part."""
        self.wait_written()
        part = self._bytes()[:_PROBE]
        times = [time.perf_counter()]
        with _opened(path, _WRITE, direct) as file:
            for piece in _pieces(part):
                _write(file, piece)
        times.append(time.perf_counter())
        with _opened(path, os.O_RDONLY, direct) as file:
            read_at(file, path, part, 0)  # the same bytes
        times.append(time.perf_counter())
        path.unlink()
        share = self.buffer.numel() / len(part)
        return (times[1] - times[0]) * share, (times[2] - times[1]) * share

    def _bytes(self) -> memoryview:
        whole: Any = self.buffer.numpy()
        return memoryview(whole)

    def free(self) -> None:
        if self._pinned:
            if self.read is not None:
                self.read.synchronize()
            self.wait_written()
            _check(torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr()), 0)
            self._pinned = False


@contextlib.contextmanager
def _opened(path: Path, flags: int, direct: bool) -> Iterator[int]:
    file = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _takes_direct(folder: Path) -> bool:
    """Whether files there can be written past the page cache; tmpfs, for one, may refuse."""
    if not hasattr(os, "O_DIRECT"):
        return False
    path = folder / "direct.raw"
    try:
        with mmap.mmap(-1, _ALIGNMENT) as page, _opened(path, _WRITE, direct=True) as file:
            os.write(file, page)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _pieces(whole: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(whole), _PIECE):
        yield whole[start : start + _PIECE]


def _write(file: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(file, piece) :]


def _check(code: Any, size: int) -> None:
    if int(code):
        raise ValueError(
            f"pinning {size / 2**30:.2f} GiB of host memory failed (CUDA error {int(code)}); "
            "expected a smaller host_memory, or a higher limit of locked memory"
        )


class ArenaPool:
    """Up to ``limit`` arenas, made by threads: ``ahead`` of them at once, the others when needed.

    For a GPU their pages are locked, and that takes about as long as a block.
    """

    def __init__(self, layout: Layout, limit: int, device: torch.device, ahead: int = 0) -> None:
        self.layout = layout
        self.limit = limit
        self.made = 0  # or being made
        self.making = 0
        self._device = device
        self._seconds: list[float] = []  # that each one took
        self._arenas: list[Arena] = []
        self._free: collections.deque[Arena] = collections.deque()
        self._waiting = 0
        self._busy = 0  # threads that make one right now
        self._paused = False
        self._stopped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()  # over all of these; the disk's thread takes some too
        self._makers = ThreadPoolExecutor(_MAKERS, "filet pinning")
        with self._change:
            for _ in range(min(ahead, limit)):
                self._begin()

    def get(self) -> Arena:
        """A free arena. Waits for one where the limit is reached."""
        with self._change:
            self._waiting += 1
            if len(self._free) + self.making < self._waiting and self.made < self.limit:
                self._begin()
            try:
                self._change.wait_for(lambda: self._free or self._error or self._stopped)
            finally:
                self._waiting -= 1
            if self._error is not None:
                raise self._error
            if not self._free:
                raise RuntimeError("the run has ended")
            return self._free.popleft()

    def grows(self) -> bool:
        """Whether who waits for an arena waits for it to be made; else for one to come back."""
        with self._change:
            return self.making > 0 or self.made < self.limit

    def stop(self) -> None:
        """Let nobody wait for an arena any more."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def put(self, arena: Arena) -> None:
        with self._change:
            self._free.append(arena)
            self._change.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No arena is made inside, where something is timed: locking pages takes its share."""
        with self._change:
            self._paused = True
            self._change.wait_for(lambda: not self._busy)
        try:
            yield
        finally:
            with self._change:
                self._paused = False
                self._change.notify_all()

    def seconds_left(self) -> float:
        """Until those begun are there, going by those that are."""
        with self._change:
            each = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
            return each * self.making / _MAKERS

    def close(self) -> None:
        self.stop()
        self._makers.shutdown(wait=True, cancel_futures=True)
        for arena in self._arenas:
            arena.free()
        self._arenas.clear()

    def _begin(self) -> None:
        self.made += 1
        self.making += 1
        self._makers.submit(self._make)

    def _make(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._paused or self._stopped)
            if self._stopped:
                return
            self._busy += 1
        arena, error = None, None
        start = time.perf_counter()
        try:
            cuda = self._device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self._device)
            arena = Arena(self.layout, cuda)
        except BaseException as raised:  # for whoever waits for it
            error = raised
        with self._change:
            self._busy -= 1
            self.making -= 1
            self._error = self._error or error
            if arena is not None:
                self._seconds.append(time.perf_counter() - start)
                self._arenas.append(arena)
                self._free.append(arena)
            self._change.notify_all()


class Fetched:
    """Tensors on their way to the device."""

    def __init__(self, tensors: list[Tensor], event: Any) -> None:
        self._tensors = tensors
        self._event = event

    def ready(self) -> list[Tensor]:
        """The tensors, for use on the current stream, which waits for them."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            stream.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._tensors


class Copies:
    """Copies between arenas and a device, beside the computation where that is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._inward = torch.cuda.Stream(device)
            self._outward = torch.cuda.Stream(device)

    def fetch(self, arenas: Sequence[Arena], batch: int, others: Sequence[Tensor]) -> Fetched:
        """The arenas' tensors of a batch, and other host tensors (pinned), as new tensors."""
        hosts = [*(arena.views[batch] for arena in arenas), *others]
        if not self._cuda:
            return Fetched([host.clone() for host in hosts], None)
        with torch.cuda.stream(self._inward):
            for arena in arenas:
                if arena.written[batch] is not None:
                    self._inward.wait_event(arena.written[batch])
            tensors = [host.to(self.device, non_blocking=True) for host in hosts]
            event = torch.cuda.Event()
            event.record()
        for arena in arenas:
            arena.read = event
        return Fetched(tensors, event)

    def store(self, value: Tensor, arena: Arena, batch: int) -> Any:
        """``value`` into the arena; returns the event of its arrival, None on a CPU."""
        if not self._cuda:
            arena.views[batch].copy_(value)
            return None
        value = value.contiguous()
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            self._outward.wait_event(computed)
            if arena.read is not None:  # what the arena held before
                self._outward.wait_event(arena.read)
            arena.views[batch].copy_(value, non_blocking=True)
            value.record_stream(self._outward)
            event = torch.cuda.Event()
            event.record()
        arena.written[batch] = event
        return event


class BlockInputs:
    """The inputs of blocks that the reverse sweep will ask for, in host memory or on disk.

    On disk past the page cache: they may be larger than the memory, are read once, and would take
    the place of the shards. And how long a disk takes can be told beforehand.
    """

    def __init__(self, pool: ArenaPool, folder: Path | None) -> None:
        self._pool = pool
        self._folder = folder
        self._direct = folder is not None and _takes_direct(folder)
        self._held: dict[int, Arena] = {}
        self._written: dict[int, Future[None]] = {}
        self._coming: dict[int, Future[Arena]] = {}
        self._disk = ThreadPoolExecutor(1, "filet scratch")

    def hold(self, block: int, arena: Arena) -> None:
        """Keep them where they are."""
        self._held[block] = arena

    def write(self, block: int, arena: Arena) -> None:
        """Begin to write them to disk; :meth:`release` says when the arena may be used again."""
        self._written[block] = self._disk.submit(arena.save, self._path(block), direct=self._direct)

    def release(self, block: int, arena: Arena) -> None:
        self._written[block].add_done_callback(lambda _: self._pool.put(arena))

    def speed(self, arena: Arena) -> tuple[float, float]:
        """Seconds to write a block's inputs to disk, and to read them."""
        assert self._folder is not None
        return arena.speed(self._folder / "speed.raw", direct=self._direct)

    def ahead(self, block: int) -> None:
        """Begin to read them, if they are on disk."""
        if block in self._written and block not in self._coming:
            self._coming[block] = self._disk.submit(self._read, block)

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
        self._disk.shutdown(wait=True, cancel_futures=True)

    def _path(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"inputs-{block}.raw"

    def _read(self, block: int) -> Arena:
        self._written[block].result()
        arena = self._pool.get()
        arena.load(self._path(block), direct=self._direct)
        self._path(block).unlink()
        return arena
