"""Statistics of parts of a data set, taken apart from each other, and which parts they are of.

A shard is one of N parts of the samples. Sums add up in any order; what has to be seen to is that
each shard is in the sum once, and that all are of one data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """Some shards of a data set.

    Attributes:
        numbers: which, counted from 1.
        of: how many there are of the data set.
        common: what all of them have in common, by its name (the data, settings).
    """

    numbers: tuple[int, ...]
    of: int
    common: Mapping[str, str]

    def __str__(self) -> str:
        several = "s" if self.numbers[1:] else ""
        return f"shard{several} {', '.join(map(str, self.numbers))} of {self.of}"

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(n for n in range(1, self.of + 1) if n not in self.numbers)

    @classmethod
    def merged(cls, one: Shards | None, other: Shards | None) -> Shards | None:
        """Of statistics merged; None for what is of no shard, or of all.

        ValueError for shards of different data or settings, and for one that is there twice.
        """
        if one is None and other is None:
            return None
        if one is None or other is None:
            raise ValueError(
                f"cannot merge statistics of {one or other} with those of no shard, or of all; "
                "expected shards of one data set, or none"
            )
        if one.of != other.of:
            raise ValueError(f"cannot merge {one} with {other}; expected shards of as many")
        for name, mine in one.common.items():
            if other.common.get(name) != mine:
                raise ValueError(
                    f"cannot merge {one} with {other}: {name} is {mine!r} there and "
                    f"{other.common.get(name)!r} here; expected the same for all shards"
                )
        twice = set(one.numbers) & set(other.numbers)
        if twice:
            raise ValueError(
                f"shard {min(twice)} of {one.of} is there twice; expected each of the shards once"
            )
        both = cls(tuple(sorted({*one.numbers, *other.numbers})), one.of, one.common)
        return both if both.missing else None

    def as_json(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "of": self.of, "common": dict(self.common)}

    @classmethod
    def of_json(cls, content: Mapping[str, Any] | None) -> Shards | None:
        """What :meth:`as_json` gave, read again; None for None."""
        if content is None:
            return None
        return cls(tuple(content["numbers"]), content["of"], content["common"])
