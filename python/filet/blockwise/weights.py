"""A model's weights in its safetensors shards, read in parts by several threads.

The files are not memory-mapped: a disk that fails, or a file that has become shorter, is then an
exception and not a signal, and nothing depends on what a kernel makes of page faults. From the page
cache, one thread is as quick either way.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from filet.model.checkpoint import (
    Entry,
    Header,
    Names,
    check_kinds,
    check_shapes,
    entries,
    headers_of,
    missing_weight,
    shard_files,
    understood,
    warn_of_unused,
)
from filet.system.files import read_at

__all__ = ["ShardedWeights", "Stored", "WeightSource"]

_READERS = 8  # threads that read a piece, each its share,
_SHARE = 2**20  # of at least so many bytes
_SAMPLES = 64  # pieces of 4 KiB of each file that enter its identity


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read in parts."""

    path: Path
    file: int  # descriptor
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    readers: ThreadPoolExecutor
    least: int  # bytes that a reader reads, at least

    def read(self, start: int, goal: Tensor) -> None:
        """The elements from ``start`` on into ``goal``: contiguous, on the CPU, of any dtype."""
        raw = goal if goal.dtype == self.dtype else torch.empty_like(goal, dtype=self.dtype)
        array: Any = raw.view(-1).view(torch.uint8).numpy()
        whole = memoryview(array)
        offset = self.offset + start * self.dtype.itemsize
        share = max(self.least, -(-len(whole) // _READERS))
        parts = [(whole[at : at + share], offset + at) for at in range(0, len(whole), share)]
        if len(parts) == 1:
            self._read(parts[0])
        else:
            for _ in self.readers.map(self._read, parts):
                pass  # it raises what went wrong
        if raw is not goal:
            goal.copy_(raw)

    def _read(self, part: tuple[memoryview, int]) -> None:
        read_at(self.file, self.path, *part)

    def tensor(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read(0, result)
        return result


class WeightSource(Protocol):
    """Where weights come from."""

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor | Stored]]:
        """Each wanted entry once, in any order, with its values: of any dtype, on the CPU.

        Of packed weights what is stored of them is wanted, :attr:`Entry.stored`.
        """

    def made_with(self, entry: Entry) -> str | None:
        """What else is read for this entry, by a name; None where it can be read in parts.

        Entries of one name are made together, each of them whole.
        """

    def identity(self) -> dict[str, Any]:
        """JSON-able; equal for equal weights."""


class ShardedWeights:
    """The safetensors files of a model's folder.

    Names are those of ``model``, which is on the meta device: those in the files with the base
    model's prefix added or dropped, and renamed, stacked or split (experts, say) as transformers
    does it on loading.

    Raises FileNotFoundError for a folder without safetensors weights, ValueError for a shard that
    is missing or damaged, and for a weight that no file has, or that is quantised or has another
    shape. Warns of what the model does not use. The files are open as long as this is there.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: nn.Module, share: int = _SHARE
    ) -> None:
        """``share``: bytes that one of several threads reads of a piece, at least."""
        self.folder = Path(folder)
        self.files = shard_files(self.folder)
        self._stored: dict[str, Stored] = {}
        headers: dict[str, Header] = {}
        readers = ThreadPoolExecutor(_READERS, "filet reading")
        for path in self.files:
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            for key, header in headers_of(path).items():
                headers[key] = header
                self._stored[key] = Stored(
                    path, file, header.offset, header.shape, header.dtype, readers, share
                )
        self._model: Any = model
        with understood(self.folder):
            self._names = Names(model, headers)
        check_kinds(self.folder, model, self._names, headers)
        stored = [each for entry in entries(model) for each in entry.stored]
        shapes = ((self._name(entry), entry.shape) for entry in stored)
        check_shapes(
            self.folder, ((name, self._names.shape(name), shape) for name, shape in shapes)
        )
        warn_of_unused(self.folder, model, self._names.unused)

    def _name(self, entry: Entry) -> str:
        """The one of an entry's names that the files know."""
        name = self._names.of(entry)
        if name is None:
            raise missing_weight(self.folder, [entry.names[0]])
        return name

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor | Stored]]:
        by_name = {self._name(entry): entry for entry in wanted}
        while by_name:
            name = next(iter(by_name))
            if name in self._names.plain:
                yield by_name.pop(name), self._stored[self._names.plain[name]]
                continue
            conversion = self._names.converted[name]
            made = conversion.run(self._model, lambda key: self._stored[key].tensor())
            for each in [each for each in made if each in by_name]:
                yield by_name.pop(each), made[each]

    def made_with(self, entry: Entry) -> str | None:
        names = [self._name(each) for each in entry.stored]
        made = [self._names.converted[name].name for name in names if name in self._names.converted]
        return made[0] if made else None

    def identity(self) -> dict[str, Any]:
        return {path.name: _file_identity(path) for path in [*self.files, *_configs(self.folder)]}


def _configs(folder: Path) -> list[Path]:
    return [folder / "config.json"]


def _file_identity(path: Path) -> str:
    """Size and hash of a file's beginning, end and pieces between, without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(2**20))  # of a shard, its header with every name and shape
        for piece in range(_SAMPLES + 1):
            file.seek(max(size - 4096, 0) * piece // _SAMPLES)
            digest.update(file.read(4096))
    return f"{size}:{digest.hexdigest()}"
