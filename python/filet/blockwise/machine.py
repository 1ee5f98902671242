"""What a run takes from the machine that it is on, and how it measures there."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch

from filet.blockwise.arenas import ArenaPool, Layout
from filet.blockwise.disk import Disk

__all__ = ["Clock", "Machine", "PeakMemory"]


class Clock:
    """Seconds, from an arbitrary beginning."""

    def now(self) -> float:
        return time.perf_counter()

    def settled(self, device: torch.device) -> float:
        """The time when a device has done everything that it was given."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.now()


class PoolFactory(Protocol):
    def __call__(
        self, layout: Layout, limit: int, device: torch.device, ahead: int
    ) -> ArenaPool: ...


def _writers() -> Executor:
    """One for a gradient, which takes a while, and one for the blocks done meanwhile."""
    return ThreadPoolExecutor(2, "filet output")


@dataclass(frozen=True)
class Machine:
    """Time, files, host memory, and the threads that the run folder is written by.

    A test gives some of its own.
    """

    clock: Clock = field(default_factory=Clock)
    disk: Disk = field(default_factory=Disk)
    pool: PoolFactory = ArenaPool
    writers: Callable[[], Executor] = _writers


class PeakMemory:
    """The peak of a GPU's memory, from one call to the next; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.most = 0  # of all calls so far, in bytes
        self._device = device

    def reset(self) -> int:
        """The peak since the last call, in bytes."""
        if self._device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.most = max(self.most, peak)
        return peak
