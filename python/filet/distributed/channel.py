"""A way between the processes for one thread beside the main one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from filet.distributed.group import TIMEOUT, Group

__all__ = ["Channel"]


class Channel:
    """Groups of its own, so that what one thread does there is in no order with anything else.

    Whatever travels on it begins with :meth:`agreed`, and all processes call it as often, until one
    calls :meth:`stop` instead: the others hear of it, or call that as well. So nobody is left
    waiting, and nothing is left under way.

    Attributes:
        group: the processes.
        open: no process has said yet that it is not fine.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        """For tensors of host memory and of this device. Collective."""
        self.group = group
        self.open = True
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._nccl = None
        self._last: tuple[Tensor, dist.Work] | None = None
        if device.type == "cuda" and group.uses_nccl:
            self._nccl = dist.new_group(backend="nccl", timeout=TIMEOUT)
            # NCCL connects at the first use: here, while no other thread has it connect as well.
            for each in (group.world, self._nccl):
                dist.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), 0, group=each)
            torch.cuda.synchronize(device)

    def agreed(self) -> bool:
        """Whether all processes are fine, which this one is. Collective."""
        if not self.open:
            return False
        failed = torch.zeros(1, dtype=torch.int32, device="cpu")
        try:
            with self.group.lost():
                dist.all_reduce(failed, group=self._control)
        except ConnectionError:
            self.open = False
            raise
        self.open = not failed.item()
        return self.open

    def stop(self) -> None:
        """Say that this process is not fine, without waiting until the others ask.

        They may be waiting for it elsewhere. Where a process is lost, whose part never comes, it is
        left to the connections, which end with this process: that would wait for its own words.
        """
        if self.open:
            self.open = False
            if self.group.broken:
                return
            failed = torch.ones(1, dtype=torch.int32, device="cpu")
            with contextlib.suppress(RuntimeError):  # a process that is gone
                work = dist.all_reduce(failed, group=self._control, async_op=True)
                self._last = failed, work  # which are used until it has ended

    def close(self) -> None:
        """Give its groups up, when all processes are through with it."""
        if self.open:
            self.open = False
            for each in (self._control, self._nccl):
                if each is not None:
                    dist.destroy_process_group(each)

    def carries(self, device: torch.device) -> bool:
        """Whether tensors on this device can travel."""
        return device.type == "cpu" or self._nccl is not None

    def share(self, buffer: Tensor, cuts: Sequence[tuple[int, int, int]]) -> None:
        """Every process gets of a flat tensor what another one has. Collective.

        On a GPU the current stream waits for it, and the host goes on.

        Args:
            cuts: (start, stop, rank): that part is the rank's. The same in all processes.
        """
        group = self._nccl if buffer.is_cuda else self._control
        with self.group.lost():
            works = [
                dist.broadcast(buffer[start:stop], rank, group=group, async_op=True)
                for start, stop, rank in cuts
                if stop > start
            ]
            for work in works:
                work.wait()
