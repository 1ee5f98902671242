"""Block inputs and boundary gradients outside the device: in host memory and on disk.

An arena is host memory for the values of one boundary between blocks: one tensor for each batch.
On a GPU it is pinned, and copies to and from it run on streams of their own beside the computation.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arena", "ArenaPool", "BlockInputs", "Copies", "Fetched", "Layout"]

_ALIGNMENT = 4096


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
        self.buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        self._pinned = False
        if pinned and layout.nbytes:
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

    def load(self, path: Path, trailer: int = 0) -> bytes:
        """Fill it from a file; returns the bytes that follow, of which there are ``trailer``."""
        if self.read is not None:
            self.read.synchronize()
        self.wait_written()
        self.written = [None] * len(self.views)
        with path.open("rb") as file:
            size = file.readinto(self._bytes())
            rest = file.read()
        if size != self.buffer.numel() or len(rest) != trailer:
            raise ValueError(
                f"{path} has {size + len(rest)} bytes; expected {self.buffer.numel() + trailer}"
            )
        return bytes(rest)

    def save(self, path: Path, trailer: bytes = b"") -> None:
        self.wait_written()
        with path.open("wb", buffering=0) as file:
            whole = self._bytes()
            while whole:  # a single write takes 2 GiB at most
                whole = whole[file.write(whole) :]
            file.write(trailer)

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


def _check(code: Any, size: int) -> None:
    if int(code):
        raise RuntimeError(
            f"pinning {size / 2**30:.2f} GiB of host memory failed (CUDA error {int(code)}); "
            "expected a smaller host_memory, or a higher limit of locked memory"
        )


class ArenaPool:
    """Up to ``limit`` arenas, made when first needed; on a GPU one ahead, by a thread."""

    def __init__(self, layout: Layout, limit: int, device: torch.device) -> None:
        self.layout = layout
        self.limit = limit
        self.made = 0
        self._device = device
        self._free: queue.Queue[Arena | None] = queue.Queue()
        self._arenas: list[Arena] = []
        self._maker = ThreadPoolExecutor(1, "filet pinning")
        self._next: Future[Arena] | None = None
        self._lock = threading.Lock()

    def get(self) -> Arena:
        """A free arena. Waits for one where the limit is reached."""
        with self._lock:  # the disk's thread takes arenas too
            with contextlib.suppress(queue.Empty):
                return self._given(self._free.get_nowait())
            making = self._next
            if making is None and self.made < self.limit:
                making = self._ahead()
            ahead = making is not None and self._device.type == "cuda" and self.made < self.limit
            self._next = self._ahead() if ahead else None
        return self._given(self._free.get()) if making is None else making.result()

    def _given(self, arena: Arena | None) -> Arena:
        if arena is None:
            self._free.put(None)  # for whoever else waits
            raise RuntimeError("the run has ended")
        return arena

    def stop(self) -> None:
        """Let nobody wait for an arena any more."""
        self._free.put(None)

    def put(self, arena: Arena) -> None:
        self._free.put(arena)

    def close(self) -> None:
        self._maker.shutdown(wait=True, cancel_futures=True)
        for arena in self._arenas:
            arena.free()
        self._arenas.clear()

    def _ahead(self) -> Future[Arena]:
        self.made += 1
        return self._maker.submit(self._make)

    def _make(self) -> Arena:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self._device)
        arena = Arena(self.layout, cuda)
        self._arenas.append(arena)
        return arena


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
    """The inputs of blocks that the reverse sweep will ask for, in host memory or on disk."""

    def __init__(self, pool: ArenaPool, folder: Path | None) -> None:
        self._pool = pool
        self._folder = folder
        self._held: dict[int, Arena] = {}
        self._written: dict[int, Future[None]] = {}
        self._coming: dict[int, Future[Arena]] = {}
        self._disk = ThreadPoolExecutor(1, "filet scratch")

    def hold(self, block: int, arena: Arena) -> None:
        """Keep them where they are."""
        self._held[block] = arena

    def write(self, block: int, arena: Arena) -> None:
        """Begin to write them to disk; :meth:`release` says when the arena may be used again."""
        self._written[block] = self._disk.submit(arena.save, self._path(block))

    def release(self, block: int, arena: Arena) -> None:
        self._written[block].add_done_callback(lambda _: self._pool.put(arena))

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
        arena.load(self._path(block))
        self._path(block).unlink()
        return arena
