"""Copies between arenas and a device, beside the computation where that is a GPU.

They run on streams of their own. Events order them and the computation.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena

__all__ = ["Copies", "Fetched", "Throttle"]

# Batches whose work the host has handed to a GPU and not seen finished.
_IN_FLIGHT = 2


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
    """Copies between arenas and a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._inward = torch.cuda.Stream(device) if cuda else None
        self._outward = torch.cuda.Stream(device) if cuda else None

    def fetch(self, arenas: Sequence[Arena], batch: int, others: Sequence[Tensor]) -> Fetched:
        """The arenas' tensors of a batch, and other host tensors (pinned), as new tensors."""
        hosts = [*(arena.views[batch] for arena in arenas), *others]
        if self._inward is None:
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
        if self._outward is None:
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


class Throttle:
    """Keeps the host at most two batches ahead of a GPU: each holds memory there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in_flight: collections.deque[Any] = collections.deque()

    def add(self, event: Any) -> None:
        """A batch whose work ends with ``event``; None is of a CPU, and has ended."""
        if event is not None:
            self._in_flight.append(event)
            if len(self._in_flight) > _IN_FLIGHT:
                self._in_flight.popleft().synchronize()

    def add_computed(self) -> None:
        """A batch whose work is what the device has been given up to now."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self.add(event)
