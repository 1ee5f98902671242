"""Block inputs and boundary gradients outside the device: where they go, how they come back."""

from __future__ import annotations

from pathlib import Path

import torch

from filet.blockwise.arenas import Arena, ArenaPool, Layout
from filet.blockwise.inputs import BlockInputs
from filet.blockwise.keeping import Keeping
from filet.blockwise.machine import Machine
from filet.blockwise.progress import Times

__all__ = ["Boundaries"]


class Boundaries:
    """The boundaries between blocks: which are kept, in what memory, and on which disk."""

    def __init__(
        self,
        layout: Layout,
        keeping: Keeping,
        device: torch.device,
        scratch: Path | None,
        times: Times,
        machine: Machine,
    ) -> None:
        self.layout = layout
        self.keeping = keeping
        ahead = keeping.arenas if device.type == "cuda" else 0
        self.pool: ArenaPool = machine.pool(layout, keeping.arenas, device, ahead)
        self.inputs = BlockInputs(self.pool, scratch, machine.disk)
        self._times = times

    def close(self) -> None:
        self.pool.stop()  # the disk's thread may wait for an arena
        self.inputs.close()
        self.pool.close()

    def get(self) -> Arena:
        """A free arena."""
        with self._times.waiting("memory" if self.pool.grows() else "disk"):
            return self.pool.get()

    def take(self, block: int) -> Arena:
        """The arena with a block's inputs, now the caller's."""
        with self._times.waiting("disk"):
            return self.inputs.take(block)

    def keep(self, block: int, arena: Arena) -> None:
        """Put a block's inputs where the plan wants them, once everything of them is on its way."""
        if block in self.keeping.on_disk:
            written = self.inputs.write(block, arena)
            written.add_done_callback(lambda _: self.pool.put(arena))
        elif block in self.keeping.kept or block > self.keeping.kept[-1]:
            self.inputs.hold(block, arena)
        else:
            self.pool.put(arena)
