"""Tensors in one safetensors file, or in several that an index names, read by one way.

Several are laid out as on the Hub: name-00001-of-0000N.safetensors, and beside them
name.safetensors.index.json, whose ``weight_map`` says which file has which tensor. Its ``metadata``
is what the one file would have. Each file says by which index it is named, and both have the same
random mark of the run that wrote them: a file of another run is not taken for one of this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from filet.system.files import index_of

__all__ = ["RUN", "Tensors", "find_index", "metadata_of", "opened", "parts_of", "shard_names"]

RUN, INDEX = "run", "index"
"""In the metadata: the mark of index and files; of a file, the name of its index."""

_SUFFIX = ".safetensors"


def shard_names(path: Path, count: int) -> list[str]:
    """The names of the files of a set that is called ``path``."""
    stem = path.name.removesuffix(_SUFFIX)
    return [f"{stem}-{n:05}-of-{count:05}{_SUFFIX}" for n in range(1, count + 1)]


def find_index(path: str | os.PathLike[str]) -> Path | None:
    """The index that ``path`` means: itself, or, where there is no such file, the one beside it."""
    path = Path(path)
    if path.name.endswith(".index.json"):
        return path
    return index_of(path) if not path.exists() and index_of(path).is_file() else None


def parts_of(path: Path) -> list[str]:
    """Names of the files beside ``path`` that say that its index names them, whichever does."""
    stem = re.escape(path.name.removesuffix(_SUFFIX))
    pattern = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}{re.escape(_SUFFIX)}")
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if pattern.fullmatch(name) and _names(folder / name, path)]


def _names(file: Path, path: Path) -> bool:
    try:
        return metadata_of(file).get(INDEX) == index_of(path).name
    except ValueError:
        return False


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """Text beside the tensors of a file or of a set. ValueError where it is neither."""
    index = find_index(path)
    if index is not None:
        return _read_index(index)[0]
    with _open(path, "cpu") as file:
        return dict(file.metadata() or {})


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file or of a set, by name; each is read when it is asked for.

    Attributes:
        metadata: text beside them.
    """

    def __init__(self, metadata: dict[str, str], places: dict[str, Any]) -> None:
        self.metadata = metadata
        self._places = places  # the open file that has it

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Iterator[Tensors]:
    """The tensors of a file, or of all files of a set, named by its index or as one file would be.

    ValueError, naming the file, where it cannot be read, where one of a set is missing, cut short
    or of another run, or where it is one of a set and the set was not asked for.
    """
    index = find_index(path)
    with contextlib.ExitStack() as stack:
        if index is None:
            file = stack.enter_context(_open(path, device))
            metadata = dict(file.metadata() or {})
            if INDEX in metadata:
                raise ValueError(
                    f"{path} is one of several files; expected their index, {metadata[INDEX]}, "
                    "beside it"
                )
            yield Tensors(metadata, dict.fromkeys(file.keys(), file))
            return
        metadata, weight_map = _read_index(index)
        files = {
            name: stack.enter_context(_open_part(index, name, metadata, weight_map, device))
            for name in sorted(set(weight_map.values()))
        }
        yield Tensors(metadata, {key: files[name] for key, name in weight_map.items()})


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Metadata, and tensor → file beside the index."""
    content: Any = None
    with contextlib.suppress(ValueError):  # of JSON and of UTF-8
        content = json.loads(index.read_text(encoding="utf-8"))
    content = content if isinstance(content, dict) else {}
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not a readable index of safetensors files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}; expected files beside it")
    return metadata, weight_map


@contextlib.contextmanager
def _open_part(
    index: Path,
    name: str,
    metadata: Mapping[str, str],
    weight_map: Mapping[str, str],
    device: torch.device | str,
) -> Iterator[Any]:
    path = index.parent / name
    if not path.is_file():
        raise ValueError(f"{path} is missing, which {index} names; expected it beside the index")
    with _open(path, device) as file:
        its = file.metadata() or {}
        if its.get(RUN) is None or its.get(RUN) != metadata.get(RUN):
            raise ValueError(
                f"{path} is not of the run that wrote {index}; expected the files of one run"
            )
        keys = set(file.keys())
        if keys != {key for key, its in weight_map.items() if its == name}:
            raise ValueError(f"{path} has not the tensors that {index} says it has")
        yield file


@contextlib.contextmanager
def _open(path: str | os.PathLike[str], device: torch.device | str) -> Iterator[Any]:
    try:
        file = safe_open(os.fspath(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    with file:
        yield file
