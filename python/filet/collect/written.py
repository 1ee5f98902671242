"""A file of statistics, or a set of files of which each process writes what it owns.

A set (:mod:`filet.system.tensorset`) is complete or absent: the files are written to a folder that
all see beside their place, and the first process moves them there together, the index last.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from filet.distributed.group import Group, current
from filet.system.files import index_of, named, replaced_together
from filet.system.tensorfile import write_tensors
from filet.system.tensorset import INDEX, RUN, metadata_of, parts_of, shard_names

__all__ = ["check_shared", "write_alone", "write_together"]


def write_alone(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    finish: Callable[[Tensor], Any],
) -> None:
    """One file, as :func:`write_tensors`; a set that was there by the name is gone afterwards."""
    write_tensors(path, tensors, metadata, finish)
    index = index_of(path)
    if index.is_file() and RUN in metadata_of(index):
        index.unlink()
    for name in parts_of(path):
        (path.parent / name).unlink()


def write_together(
    group: Group,
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    finish: Callable[[Tensor], Any],
) -> None:
    """A set of files: of each process that has any tensors one, with these. Collective.

    What was there before by the name, a file or a set, is replaced when all have written, and
    stays where one fails.

    Args:
        tensors: of this process; no name is given by two. Copied to the host one at a time.
        metadata: of the index, the same in all processes; of it each file has the format.
        finish: changes the copy of a tensor in place before it is written.

    Raises:
        ValueError: the disk is not shared; a set of another kind is there.
        OSError: a file cannot be written.
    """
    sizes = group.exchanged({name: tensor.nbytes for name, tensor in tensors.items()})
    having = [rank for rank, its in enumerate(sizes) if its]
    names = shard_names(path, len(having))
    file_of = dict(zip(having, names, strict=True))
    run = {RUN: group.from_first(uuid.uuid4().hex)}
    if group.rank == 0:
        _check_replaceable(path, names)
    path = path.absolute()
    with _seen_by_all(group, path, path.parent) as place:
        if tensors:
            own = {"format": metadata["format"], INDEX: index_of(path).name, **run}
            with named(path, place):
                write_tensors(place / file_of[group.rank], tensors, own, finish)
        group.settle()
        if group.rank == 0:
            _check_there(place, file_of, path)
            total = sum(size for its in sizes for size in its.values())
            content = {
                "metadata": {"total_size": total, **metadata, **run},
                "weight_map": {key: file_of[rank] for rank in having for key in sizes[rank]},
            }
            index = index_of(path).name
            stale = [name for name in parts_of(path) if name not in names]
            with named(path, place):
                (place / index).write_text(json.dumps(content), encoding="utf-8")
                replaced_together(place, path.parent, [path.name, *stale, *names, index])
        group.settle()


def check_shared(path: Path) -> None:
    """ValueError where the processes do not write ``path`` to one disk. Collective.

    Before the work whose result is to be put there. Nothing is left there.
    """
    group = current()
    if group is not None:
        path = path.absolute()
        folder = next(each for each in path.parents if each.is_dir())
        with group, _seen_by_all(group, path, folder):
            pass


@contextlib.contextmanager
def _seen_by_all(group: Group, path: Path, folder: Path) -> Iterator[Path]:
    """A temporary folder in ``folder`` of the first process, on a disk of all. Collective."""
    made = None
    try:
        if group.rank == 0:
            with named(path, folder):
                folder.mkdir(parents=True, exist_ok=True)
                made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=folder))
        place: Path = group.from_first(made)  # type: ignore[assignment]
        for rank, seen in enumerate(group.exchanged(place.is_dir())):
            if not seen:
                raise ValueError(
                    f"{path}: rank {rank} does not see what rank 0 writes beside it; expected a "
                    "folder on a disk of all processes, as each writes its part of the statistics; "
                    "or filet stats --shard on each machine and --merge; or Statistics.whole(), "
                    "which gathers them in the first process, and a save there"
                )
        yield place
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _check_there(place: Path, file_of: Mapping[int, str], path: Path) -> None:
    for rank, name in file_of.items():
        if not (place / name).is_file():
            raise ValueError(
                f"{path}: {name}, which rank {rank} wrote, is not there; expected a disk that all "
                "processes share"
            )


def _check_replaceable(path: Path, names: list[str]) -> None:
    """ValueError where something of another kind has a name that a set is to have."""
    ours = parts_of(path)
    others = [name for name in names if (path.parent / name).exists() and name not in ours]
    index = index_of(path)
    if index.exists() and RUN not in metadata_of(index):
        others.append(index.name)
    if others:
        raise ValueError(
            f"{path.parent / others[0]} is there and no part of statistics; expected another name "
            "for those that are saved"
        )
