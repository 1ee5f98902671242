"""Words for messages: sizes, counts, lists and names that may be long."""

from __future__ import annotations

__all__ = ["elide", "plural", "readable", "some"]

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def readable(size: float) -> str:
    """A number of bytes in the unit that suits it: "19.6 GiB"."""
    power = 0
    while abs(size) >= 1000 and power < 3:  # so that it has at most three digits before its unit
        size /= 1024
        power += 1
    return f"{size:.3g} {_UNITS[power]}"


def some(names: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plural(number: int, noun: str) -> str:
    """``1 sample``, ``8,192 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def elide(name: str, room: int) -> str:
    """``name``, its beginning replaced by ``...`` where it is longer than ``room``.

    The tail is what tells modules apart: the layer's number and the projection.
    """
    if len(name) <= room:
        return name
    return "..." + name[-max(room - 3, 1) :]
