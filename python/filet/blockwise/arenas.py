"""Host memory for the boundaries between blocks: an arena has one boundary's tensor of each batch.

For a GPU an arena is pinned. A pool of threads makes the arenas and keeps those that are free.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from filet.blockwise.disk import ALIGNMENT, Disk

__all__ = ["Arena", "ArenaPool", "Gradient", "Layout", "check_pinned"]

# Threads that make arenas: one touches the pages of its own while another locks them.
_MAKERS = 2


class Layout:
    """Where each batch's tensor lies in an arena.

    Attributes:
        nbytes: of all of them.
        of_gradients: bytes of the first tensors, those of batches that a gradient belongs to.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], dtype: torch.dtype, gradients: int | None = None
    ) -> None:
        """``gradients``: how many of the batches have one, all by default."""
        self.shapes = list(shapes)
        self.dtype = dtype
        self.half = dtype == torch.float16  # its gradients need a scale
        self.offsets: list[int] = []
        self.nbytes = 0
        for shape in self.shapes:
            self.offsets.append(self.nbytes)
            size = shape.numel() * dtype.itemsize
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = max(self.nbytes, ALIGNMENT)  # of a process without a batch
        number = len(shapes) if gradients is None else gradients
        self.of_gradients = [*self.offsets, self.nbytes][number] if number else 0

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
            check_pinned(torch.cuda.cudart().cudaHostRegister(pointer, size, 0), size)
            self._pinned = True
        self.views = layout.views(self.buffer)
        self.written: list[Any] = [None] * len(self.views)  # events: the tensor has arrived
        self.read: Any = None  # event: everything that was to be read from here has been

    def wait_written(self) -> None:
        for event in self.written:
            if event is not None:
                event.synchronize()

    def load(
        self,
        disk: Disk,
        path: Path,
        trailer: int = 0,
        *,
        direct: bool = False,
        nbytes: int | None = None,
    ) -> bytes:
        """Fill the arena, or its first ``nbytes``, from a file by :meth:`Disk.load`.

        Returns the bytes that follow.
        """
        self._settle()
        return disk.load(path, self.bytes()[:nbytes], trailer, direct=direct)

    def clear(self) -> None:
        """Zeros, to be written to by the host."""
        self._settle()
        self.buffer.zero_()

    def _settle(self) -> None:
        """Wait for all copies that use the arena, before the host writes to it."""
        if self.read is not None:
            self.read.synchronize()
        self.wait_written()
        self.written = [None] * len(self.views)

    def save(
        self,
        disk: Disk,
        path: Path,
        trailer: bytes = b"",
        abandon: threading.Event | None = None,
        *,
        direct: bool = False,
        nbytes: int | None = None,
    ) -> None:
        """Write the arena, or its first ``nbytes``, to a file by :meth:`Disk.save`."""
        self.wait_written()
        disk.save(path, self.bytes()[:nbytes], trailer, abandon, direct=direct)

    def bytes(self) -> memoryview:
        whole: Any = self.buffer.numpy()
        return memoryview(whole)

    def free(self) -> None:
        if self._pinned:
            if self.read is not None:
                self.read.synchronize()
            self.wait_written()
            check_pinned(torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr()), 0)
            self._pinned = False


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of the summed loss with respect to one boundary, times ``scale``."""

    arena: Arena
    scale: float
    peak: float  # its largest number in float16, which sets the next scale; else 0


def check_pinned(code: Any, size: int) -> None:
    """ValueError for a code other than 0 of CUDA, asked to pin ``size`` bytes or to free them."""
    if int(code):
        raise ValueError(
            f"pinning {size / 2**30:.2f} GiB of host memory failed (CUDA error {int(code)}); "
            "expected a smaller host_memory, or a higher limit of locked memory"
        )


class ArenaPool:
    """Up to ``limit`` arenas, made by threads: ``ahead`` of them at once, the others when needed.

    For a GPU their pages are locked, and that takes about as long as a block.
    """

    def __init__(
        self,
        layout: Layout,
        limit: int,
        device: torch.device,
        ahead: int = 0,
        make: Callable[[Layout, bool], Arena] = Arena,
    ) -> None:
        self.layout = layout
        self.limit = limit
        self.made = 0  # or being made
        self.making = 0
        self._device = device
        self._make_arena = make
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
        """Whether :meth:`get` would wait for a new arena; else it waits for one to come back."""
        with self._change:
            return self.making > 0 or self.made < self.limit

    def stop(self) -> None:
        """End every wait for an arena, and refuse the next."""
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
            arena = self._make_arena(self.layout, cuda)
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
