"""From devices to the host: many scalars with one wait, and large tensors in the background."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["background_copies", "values"]

_CHUNK = 2**25  # bytes of a pinned buffer


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
            buffers.extend(torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in "12")
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
