"""Files of raw bytes: written in pieces, read whole, past the page cache where asked."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from filet.system.files import read_at

__all__ = ["ALIGNMENT", "Abandoned", "Disk"]

ALIGNMENT = 4096
"""Bytes: what goes past the page cache begins and ends with a multiple."""

# What goes to a file at a time. Synced each where that can be abandoned: the sync of all of it at
# the end could not.
_PIECE = 2**25
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


class Abandoned(Exception):
    """A file was not written to the end, as was asked for."""


class Disk:
    """The files of a run. A test gives one that is slow, or full."""

    def __init__(self, piece: int = _PIECE) -> None:
        self.piece = piece

    def save(
        self,
        path: Path,
        data: memoryview,
        trailer: bytes = b"",
        abandon: threading.Event | None = None,
        *,
        direct: bool = False,
    ) -> None:
        """Write a file; :class:`Abandoned` soon after ``abandon`` is set.

        ``direct``: past the page cache.
        """
        with _opened(path, _WRITE, direct) as file:
            for start in range(0, len(data), self.piece):
                if abandon is not None and abandon.is_set():
                    raise Abandoned
                _write(file, data[start : start + self.piece])
                if abandon is not None:
                    os.fdatasync(file)
            os.write(file, trailer)

    def load(
        self, path: Path, goal: memoryview, trailer: int = 0, *, direct: bool = False
    ) -> bytes:
        """Fill ``goal`` from a file; returns the bytes that follow, of which there are ``trailer``.

        ``direct``: past the page cache.
        """
        with _opened(path, os.O_RDONLY, direct) as file:
            size = os.fstat(file).st_size
            if size != len(goal) + trailer:
                raise ValueError(f"{path} has {size} bytes; expected {len(goal) + trailer}")
            read_at(file, path, goal, 0)
            return os.pread(file, trailer, len(goal))

    def part(self, path: Path, goal: memoryview, offset: int) -> None:
        """Fill ``goal`` with the bytes of a file from ``offset`` on."""
        with _opened(path, os.O_RDONLY, direct=False) as file:
            read_at(file, path, goal, offset)

    def free(self, folder: Path) -> int:
        """Bytes that are free where ``folder`` lies."""
        return shutil.disk_usage(folder).free

    def is_one(self, one: Path, other: Path) -> bool:
        """Whether two folders lie on the same disk."""
        return one.stat().st_dev == other.stat().st_dev

    def takes_direct(self, folder: Path) -> bool:
        """Whether files there can be written past the page cache; tmpfs, for one, may refuse."""
        if not hasattr(os, "O_DIRECT"):
            return False
        path = folder / "direct.raw"
        try:
            with mmap.mmap(-1, ALIGNMENT) as page, _opened(path, _WRITE, direct=True) as file:
                os.write(file, page)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        finally:
            path.unlink(missing_ok=True)
        return True


@contextlib.contextmanager
def _opened(path: Path, flags: int, direct: bool) -> Iterator[int]:
    file = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _write(file: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(file, piece) :]
