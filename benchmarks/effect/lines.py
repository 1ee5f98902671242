"""Lines of a table as a CSV file: the fields of a dataclass are its columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

__all__ = ["read_lines", "write_lines"]

T = TypeVar("T")


def write_lines(path: Path, kind: type[Any], lines: Iterable[Any], *, add: bool = False) -> None:
    """A file of ``lines``, all of one dataclass, in place of what is there, or after it."""
    rows = [asdict(line) for line in lines]
    new = not (add and path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The lines of a file, of a dataclass whose fields are text and numbers.

    ValueError for a file of other columns.
    """
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {names}")
        return [kind(**{key: hints[key](value) for key, value in row.items()}) for row in reader]
