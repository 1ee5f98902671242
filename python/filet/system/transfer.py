"""Between devices and the host: many scalars with one wait, and large tensors by pinned buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["Staging", "background_copies", "values"]

_CHUNK = 2**25  # bytes of a pinned buffer, where nothing else is said


def values(scalars: Sequence[Tensor]) -> list[Any]:
    """The numbers in () tensors, with one wait for each device and dtype instead of one each."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, scalar in enumerate(scalars):
        places.setdefault((scalar.device, scalar.dtype), []).append(index)
    found: list[Any] = [None] * len(scalars)
    for indices in places.values():
        numbers = torch.stack([scalars[index] for index in indices]).tolist()
        for index, number in zip(indices, numbers, strict=True):
            found[index] = number
    return found


@contextlib.contextmanager
def background_copies(tensors: Mapping[str, Tensor]) -> Iterator[Callable[[str], Tensor]]:
    """Copies tensors to the CPU on a thread of its own; gives what waits for the copy of one.

    The copy of a name can be asked for once. Nobody may write the tensors before that. They leave
    a GPU through two pinned buffers: a copy straight into pageable memory holds a lock of the
    driver, behind which every other copy waits (224 reads of one number took 9 s beside those of
    an 8B model, H100).
    """
    streams = {}
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        streams[device] = torch.cuda.Stream(device)
        streams[device].wait_stream(torch.cuda.current_stream(device))  # whoever wrote them
    buffers: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        source = tensor.detach()
        if not source.is_cuda or not source.is_contiguous():
            return source.to("cpu", copy=True)
        if not buffers:
            buffers.extend(_pinned(_CHUNK) for _ in "12")
        target = torch.empty_like(source, device="cpu")
        taken, given = (x.view(-1).view(torch.uint8) for x in (source, target))
        waiting: list[tuple[torch.cuda.Event, Tensor, Tensor]] = []

        def arrive() -> None:
            event, arrived, place = waiting.pop()
            event.synchronize()
            place.copy_(arrived)

        with torch.cuda.device(source.device), torch.cuda.stream(streams[source.device]):
            for number, start in enumerate(range(0, taken.numel(), _CHUNK)):
                chunk = taken[start : start + _CHUNK]
                buffer = buffers[number % 2][: chunk.numel()]
                buffer.copy_(chunk, non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record()
                if waiting:
                    arrive()
                waiting.append((event, buffer, given[start : start + _CHUNK]))
            if waiting:
                arrive()
        return target

    pool = ThreadPoolExecutor(1)
    try:
        copies = {name: pool.submit(copied, tensor) for name, tensor in tensors.items()}
        yield lambda name: copies.pop(name).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


class Staging:
    """Two pinned buffers on the way from files or pageable memory to a GPU's current stream."""

    def __init__(self, piece: int = _CHUNK) -> None:
        """``piece``: bytes of each buffer."""
        self._piece = piece
        self._buffers = [_pinned(piece) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def send(self, goal: Tensor, fill: Callable[[Tensor, int], object]) -> None:
        """Write ``goal``, contiguous and on a GPU, a piece at a time.

        ``fill(piece, first)`` writes a flat piece on the CPU, the elements from ``first`` on.
        """
        flat = goal.view(-1)
        step = self._piece // goal.element_size()
        with torch.cuda.device(goal.device):
            for first in range(0, flat.numel(), step):
                piece = flat[first : first + step]
                index, self._next = self._next, 1 - self._next
                before = self._events[index]
                if before is not None:
                    before.synchronize()
                staged = self._buffers[index].view(goal.dtype)[: piece.numel()]
                fill(staged, first)
                piece.copy_(staged, non_blocking=True)
                event = self._events[index] = torch.cuda.Event()
                event.record()

    def copied(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of the CPU as a new one on a GPU, contiguous."""
        source = tensor.detach().reshape(-1)
        goal = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        # The CPU's copy is by all of torch's threads, the driver's own by one.
        self.send(goal, lambda piece, at: piece.copy_(source[at : at + piece.numel()]))
        return goal
