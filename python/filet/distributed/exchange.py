"""Tensors of a block at a time between processes, the next ones prepared while these travel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from filet.distributed.group import Group
from filet.distributed.triangles import pack, packed_size, unpack

__all__ = ["Square", "balanced", "gathered", "reduced", "spread"]

_AHEAD = 2  # buffers under way

Square = tuple[int, torch.dtype, torch.device, Tensor | None]
"""A symmetric sum: its size, dtype and device, and itself; None where this process has none."""

Described = tuple[tuple[int, ...], torch.dtype, torch.device]
"""A tensor's shape, dtype and device."""


def balanced(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """Which rank gets what of these sizes: the largest first, each to whoever has least.

    ``loads`` of the ranks so far; mutated.
    """
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


def reduced(group: Group, blocks: Iterable[tuple[int, Sequence[Square]]]) -> list[list[Tensor]]:
    """Sums over all processes, a block at a time, on the rank that owns it. Collective.

    Args:
        blocks: of each its owner, and its squares, the same on every rank but for the tensors.

    Returns:
        the squares of every block: on its owner the sums (the tensors given, changed in place, or
        new ones), elsewhere tensors on the meta device.
    """
    found: list[list[Tensor]] = []
    queue = _Queue(group)
    for owner, squares in blocks:
        result = [_place(square, owner == group.rank) for square in squares]
        found.append(result)
        begun = []
        for alike in _alike(square[1:3] for square in squares):
            goals = [result[i] for i in alike] if owner == group.rank else []
            begun.append((_packed(group, [squares[i] for i in alike]), goals))
        group.settle()  # whoever has no room for it says so, and nobody waits for what it lacks
        for flat, goals in begun:
            queue.put(group.reduce(flat, owner), _unpacked, flat, goals)
    queue.drain()
    return found


def _place(square: Square, mine: bool) -> Tensor:
    size, dtype, device, tensor = square
    if not mine:
        return torch.empty(size, size, dtype=dtype, device="meta")
    return torch.zeros(size, size, dtype=dtype, device=device) if tensor is None else tensor


def _alike(kinds: Iterable[tuple[torch.dtype, torch.device]]) -> list[list[int]]:
    """Places of tensors of one dtype and device: these travel together."""
    found: dict[tuple[torch.dtype, str], list[int]] = {}
    for index, (dtype, device) in enumerate(kinds):
        found.setdefault((dtype, device.type), []).append(index)
    return list(found.values())


def _packed(group: Group, squares: Sequence[Square]) -> Tensor:
    sizes = [packed_size(size) for size, *_ in squares]
    _, dtype, device, _ = squares[0]
    flat = torch.empty(sum(sizes), dtype=dtype, device=group.place(device))
    for part, (_, _, _, tensor) in zip(flat.split(sizes), squares, strict=True):
        if tensor is None:
            part.zero_()
        else:
            pack(tensor.to(flat.device), part)
    return flat


def _unpacked(flat: Tensor, squares: Sequence[Tensor]) -> None:
    start = 0
    for square in squares:
        stop = start + packed_size(len(square))
        unpack(flat[start:stop], square)
        start = stop


def spread(
    group: Group, blocks: Iterable[tuple[int, Sequence[Described], Sequence[Tensor]]]
) -> list[list[Tensor]]:
    """Tensors of every block from the rank that owns it, to the bit the same on all. Collective.

    Args:
        blocks: of each its owner, what its tensors are, and on the owner the tensors.
    """
    found: list[list[Tensor]] = []
    queue = _Queue(group)
    for owner, described, tensors in blocks:
        mine = owner == group.rank
        result = (
            list(tensors) if mine else [torch.empty(s, dtype=d, device=p) for s, d, p in described]
        )
        found.append(result)
        begun = []
        for indices in _alike(each[1:3] for each in described):
            alike = [result[i] for i in indices]
            place = group.place(alike[0].device)
            if mine:
                flat = torch.cat([tensor.to(place).reshape(-1) for tensor in alike])
            else:
                size = sum(tensor.numel() for tensor in alike)
                flat = torch.empty(size, dtype=alike[0].dtype, device=place)
            begun.append((flat, [] if mine else alike))
        group.settle()
        for flat, goals in begun:
            queue.put(group.broadcast(flat, owner), _divided, flat, goals)
    queue.drain()
    return found


def _divided(flat: Tensor, goals: Sequence[Tensor]) -> None:
    start = 0
    for goal in goals:
        stop = start + goal.numel()
        goal.copy_(flat[start:stop].view(goal.shape))
        start = stop


def gathered(group: Group, squares: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """On the first rank, all squares in host memory; on the others none. Collective.

    ``squares``: of each its owner and itself, on the meta device elsewhere.
    """
    found = []
    for owner, square in squares:
        if owner == 0:
            found += [square] if group.rank == 0 else []
            continue
        flat = whole = torch.empty(0, dtype=torch.uint8, device="cpu")
        if group.rank in (0, owner):
            flat = torch.empty(packed_size(len(square)), dtype=square.dtype, device="cpu")
        if group.rank == 0:
            whole = torch.zeros(square.shape, dtype=square.dtype, device="cpu")
        elif group.rank == owner:
            pack(square.cpu(), flat)
        group.settle()
        if group.rank == owner:
            group.send(flat, 0)
        elif group.rank == 0:
            group.receive(flat, owner)
            unpack(flat, whole)
            found.append(whole)
    return found


class _Queue:
    """What is under way, and what is done with it when it has arrived."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._under_way: deque[tuple[Any, Callable[..., None], tuple[Any, ...]]] = deque()

    def put(self, work: Any, arrived: Callable[..., None], *arguments: Any) -> None:
        self._under_way.append((work, arrived, arguments))
        if len(self._under_way) > _AHEAD:
            self._next()

    def drain(self) -> None:
        while self._under_way:
            self._next()

    def _next(self) -> None:
        work, arrived, arguments = self._under_way.popleft()
        self._group.wait(work)
        arrived(*arguments)
