"""What a run says on the way, and the seconds that it took and waited."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from filet.blockwise.batches import Batch
from filet.blockwise.machine import Clock
from filet.system.text import readable

__all__ = ["Progress", "Times", "UnderWay", "say"]


class UnderWay:
    """What is under way, for the message of a shortage."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self) -> str:
        return self._what

    def set(self, what: str) -> None:
        self._what = what


class Times:
    """Seconds of a run.

    Attributes:
        seconds: phase → what it took, after the device has done everything.
        waited: how long the computation of the sweeps waited: for weights; for host memory to be
            made (once each arena); for a disk; for other processes, exchanges with them included.
        blocks: sweep → what each block took, by the host, which a GPU may be two batches behind.
            "recomputed" is a block's forward in the reverse sweep, for the inputs of the next ones.
    """

    def __init__(self, clock: Clock, device: torch.device, several: bool = False) -> None:
        """``several``: processes."""
        self.clock = clock
        self._several = several
        self.seconds: dict[str, float] = {}
        self.waited = {"weights": 0.0, "memory": 0.0, "disk": 0.0, "processes": 0.0}
        kinds = ("forward", "recomputed", "reverse")
        self.blocks: dict[str, list[float]] = {kind: [] for kind in kinds}
        self._device = device

    def passed(self, phase: str, start: float) -> float:
        """Count what a phase took since ``start``; returns the time now."""
        now = self.clock.settled(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        return now

    def took(self, sweep: str, start: float) -> float:
        """Count what a block took since ``start``; returns the time now."""
        now = self.clock.now()
        self.blocks[sweep].append(now - start)
        return now

    def text(self) -> str:
        return (
            f"waited        {self.waited['weights']:.1f} s for weights, "
            f"{self.waited['memory']:.1f} s for host memory to be page-locked, "
            f"{self.waited['disk']:.1f} s for the disk"
            + (f", {self.waited['processes']:.1f} s for processes" if self._several else "")
        )

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the time inside as waiting for ``what``."""
        start = self.clock.now()
        try:
            yield
        finally:
            self.waited[what] += self.clock.now() - start


class Progress:
    """A bar over the batches of some blocks."""

    def __init__(
        self,
        what: str,
        blocks: int,
        of: int,
        batches: Sequence[Batch],
        steps: int,
        device: torch.device,
        show: bool,
    ) -> None:
        """``blocks`` to go through, ``of`` the model's; ``steps``: batches that go through each."""
        self._of = of
        self._batches = batches
        self._device = device
        self._show = show
        self._done = 0
        self._bar = tqdm(total=blocks * steps, unit="batch", desc=what, disable=not show)

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)

    def advance(self, block: int, index: int) -> None:
        """A batch has gone through a block; the block after the last one is the head."""
        self._done += self._batches[index].positions
        self._bar.update()
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed and self._show:
            where = f"block {block + 1}/{self._of}" if block < self._of else "head"
            text = f"{where}, {self._done / elapsed:,.0f} tokens/s a block"
            if self._device.type == "cuda":
                text += f", {readable(torch.cuda.memory_allocated(self._device))}"
            self._bar.set_postfix_str(text, refresh=False)


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
