"""Who reads what of a group of weights, where several processes read it together.

What lies in the files as it will in memory is cut into ranges of bytes. What has to be made of
whole tensors (quantised on its way, or of several by transformers' conversions) is one process's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from filet.distributed.exchange import balanced
from filet.model.checkpoint import Entry

__all__ = ["ALIGNMENT", "Division", "divided", "size_of"]

ALIGNMENT = 256  # bytes: what the allocator itself gives, and TMA and vector loads ask for


def size_of(group: Sequence[Entry]) -> int:
    """Bytes of a group in memory."""
    parts = (part for entry in group for part in entry.parts.values())
    return sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts)


@dataclass(frozen=True)
class Division:
    """A group of weights in the order in which they lie in memory, and who reads what of it.

    Attributes:
        whole: of the weights that one process reads whole, which come first, the rank of each.
        cuts: (start, stop, rank): those bytes are read by that process. All of the group.
    """

    group: Sequence[Entry]
    whole: Sequence[int]
    cuts: Sequence[tuple[int, int, int]]

    def range_of(self, rank: int) -> tuple[int, int]:
        """The bytes that a process reads of what comes after the whole ones."""
        start = size_of(self.group[: len(self.whole)])
        ranges = [(a, b) for a, b, reader in self.cuts if reader == rank and a >= start]
        return ranges[0] if ranges else (start, start)


def divided(
    group: Sequence[Entry], size: int, made_with: Callable[[Entry], str | None]
) -> Division:
    """Balanced by the bytes that are read.

    Args:
        size: how many processes there are; for one everything is its own.
        made_with: what a weight is made in one go with, None where it is read in parts.
    """
    by_name: dict[str, list[Entry]] = {}
    plain = []
    for entry in group:
        name = made_with(entry) if _is_plain(entry) else entry.names[0]
        if name is None:
            plain.append(entry)
        else:
            by_name.setdefault(name, []).append(entry)
    units = list(by_name.values())
    loads = [0] * size
    read = [sum(part.nbytes for entry in unit for part in entry.stored) for unit in units]
    owners = balanced(read, loads)
    cuts, whole, end = [], [], 0
    for unit, owner in zip(units, owners, strict=True):
        start, end = end, end + size_of(unit)
        cuts.append((start, end, owner))
        whole += [owner] * len(unit)
    for rank, share in enumerate(_levelled(size_of(plain), loads)):
        start, end = end, end + share
        cuts.append((start, end, rank))
    ordered = [entry for unit in units for entry in unit]
    return Division([*ordered, *plain], whole, cuts)


def _is_plain(entry: Entry) -> bool:
    """Whether what is read of a weight is what lies in memory."""
    return entry.packed is None or not entry.packed.quantises


def _levelled(total: int, loads: Sequence[int]) -> list[int]:
    """Shares of ``total`` bytes, whole pieces, that bring the loads to one level."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    level = 0.0
    for most in range(len(order), 0, -1):
        level = (total + sum(loads[rank] for rank in order[:most])) / most
        if level >= loads[order[most - 1]]:
            break
        order.pop()  # whoever has more than the level gets none
    shares, left = [0] * len(loads), total
    for rank in order:
        share = -int(-(level - loads[rank]) // ALIGNMENT) * ALIGNMENT
        shares[rank] = min(left, share)
        left -= shares[rank]
    shares[order[0]] += left
    return shares
