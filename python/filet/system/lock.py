"""Exclusive use of a folder that comes and goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["FolderLock"]


class FolderLock:
    """A folder that one process at a time uses; created on entering, if it is not there.

    The lock is on a file in the folder, and goes with it: a process that waits to lock the file
    while the folder is removed has the lock on a file that nobody else finds. So what was locked
    has to be what is there, or it is tried again.

    Raises:
        ValueError: another process, or another object of this one, uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = folder.resolve()  # a link stays where it is
        self._removed: Path | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        while self._file is None:
            self._file = self._acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()  # unlocks; and some file systems remove no folder with an open file
            self._file = None
        if self._removed is not None:
            shutil.rmtree(self._removed)

    def remove(self) -> None:
        """Remove the folder with all that is in it, while the lock is held.

        It is renamed, so that it goes at once: whoever comes next makes one of his own, and a kill
        leaves no half of it. What it held is deleted on leaving.
        """
        place = self._place
        self._removed = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        os.rename(place, self._removed)

    def _acquire(self) -> IO[str] | None:
        """The locked file, or None where the folder was removed meanwhile."""
        self._place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._place.mkdir()
        path = self._place / "lock"
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.folder} is in use by another process; expected one at a time"
                ) from error
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                stack.pop_all()
                return file
        return None
