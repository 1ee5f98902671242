"""Writing files so that they are complete or absent, and reading all that is asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = [
    "check_place",
    "index_of",
    "inside",
    "named",
    "read_at",
    "replaced",
    "replaced_together",
    "staged",
]


def read_at(file: int, path: Path, goal: memoryview, offset: int) -> None:
    """Fill ``goal`` from an open file; ``path`` is for the error where it ends before."""
    while goal:
        count = os.preadv(file, [goal], offset)
        if not count:
            raise ValueError(f"{path} ends at {offset} bytes; it was longer at first")
        goal, offset = goal[count:], offset + count


def index_of(path: str | os.PathLike[str]) -> Path:
    """The index beside ``path``, where its content is in several files (:mod:`.tensorset`)."""
    path = Path(path)
    return path.with_name(f"{path.name}.index.json")


@contextlib.contextmanager
def named(output: Path, workspace: Path) -> Iterator[None]:
    """Inside, an OSError of a file in ``workspace``, or of none, is one of ``output``.

    Of a full disk, say, the user hears the destination, not the temporary name.
    """
    try:
        yield
    except OSError as error:
        if error.strerror and (error.filename is None or inside(error.filename, workspace)):
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed to it at the end, removed on an exception.

    ``durable`` also waits until the disk has it, before and after: what is there after a power cut
    is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        with named(path, beside):
            yield beside
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes it private
        if durable:
            _sync(beside)
        os.replace(beside, path)
        if durable:
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def replaced_together(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Move files from ``source`` into ``folder``, on the same disk: all, or on an exception none.

    Of a name that ``source`` lacks, ``folder`` has no file afterwards. The last name goes first and
    comes last. Killed in between, the folder lacks it, and what was there before lies in a hidden
    folder beside.
    """
    with tempfile.TemporaryDirectory(prefix=".replaced.", dir=folder) as place:
        aside = Path(place)
        try:
            for name in reversed(names):
                if (folder / name).exists():
                    # Unless another process that saves there as well was faster.
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(folder / name, aside / name)
            for name in names:
                if (source / name).exists():
                    os.rename(source / name, folder / name)
        except BaseException:
            for name in names:
                if (aside / name).exists():
                    os.rename(aside / name, folder / name)
                elif not (source / name).exists():
                    (folder / name).unlink(missing_ok=True)
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def check_place(path: Path) -> None:
    """OSError, naming ``path``, where nothing can be made there as far as its folders say.

    Before the work whose result is to be put there. Creates nothing.
    """
    folder = next(each for each in path.resolve().parents if os.path.lexists(each))
    number = 0
    if not folder.is_dir():
        number = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number:
        raise OSError(number, f"{os.strerror(number)} ({folder})", str(path))


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of ``output`` at the end.

    It lies in a temporary folder beside ``output``, on the same disk. When the block raises, the
    temporary folder is removed and whatever ``output`` was before is untouched; otherwise the old
    one is put aside, the new one renamed into place, and the old one removed.
    """
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    try:
        place = workspace / output.name
        with named(output, workspace):
            yield place
        if output.is_dir():
            aside = workspace / f"{output.name}.old"
            os.rename(output, aside)
            try:
                os.rename(place, output)
            except BaseException:
                os.rename(aside, output)
                raise
        else:
            os.replace(place, output)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
