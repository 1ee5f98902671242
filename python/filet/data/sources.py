"""Where rows come from: a file, a folder of files or a name on the Hub, through ``datasets``.

A path on this machine is read without a word to the network. Files become Arrow in the user's cache
of ``datasets`` on their first use, or are streamed.
"""

from __future__ import annotations

import contextlib
import gzip
import heapq
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filet.system.memory import available_on_host

__all__ = ["HUB_NAME", "KINDS", "Source", "draw"]

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""Suffix of a file → what ``datasets`` calls its kind. All but parquet may be ``.gz`` as well."""

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Folders of these names are splits to ``datasets``.
_SPLITS = set("train training validation valid dev val test testing eval evaluation".split())

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# Of a streamed data set on the Hub: rows among which the next one is drawn.
_BUFFER = 10_000
# Of map-style rows: how many are taken out at a time.
_CHUNK = 1000


@dataclass(frozen=True)
class Source:
    """A data set by its path or name.

    Attributes:
        path: a file, a folder that ``save_to_disk`` wrote or that has files of one kind, else
            ``owner/name`` of a data set on the Hub.
        split: of a folder with several and of the Hub.
        subset: of the Hub, where a data set has several.
        revision: of the Hub: a branch, a tag or a commit.
        streaming: read row by row, without a copy in the cache; None: where files are larger than
            the memory that is free.
    """

    path: str | os.PathLike[str]
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool | None = None

    def rows(self) -> Any:
        """A ``Dataset``, or an ``IterableDataset`` where rows are streamed or lines become blocks.

        Raises FileNotFoundError for what is neither a path nor a name, ValueError for what cannot
        be read; a streamed file is read later.
        """
        path = Path(self.path)
        if path.is_dir():
            found = _saved(path, self.split)
            found = self._images(path) if found is None else found
            return self._files(_files_in(path)) if found is None else found
        if path.is_file():
            return self._files([path])
        if not self.on_hub:
            raise FileNotFoundError(
                f"no data file at {path}; expected a file ({', '.join(KINDS)}), a folder, or "
                "owner/name of a data set on the Hub"
            )
        return self._downloaded()

    @property
    def on_hub(self) -> bool:
        """Whether the path is a name: a path that is there wins over a name."""
        name = str(self.path)
        known = _kind(Path(name)) is not None
        return not Path(name).exists() and bool(HUB_NAME.fullmatch(name)) and not known

    def _files(self, files: list[Path]) -> Any:
        from datasets import Dataset

        kinds = {_kind(file) for file in files}
        kind = kinds.pop()
        if kind is None or kinds:
            raise ValueError(
                f"{self.path}: unknown suffix, expected one of {', '.join(KINDS)} (and .gz but of "
                ".parquet), or a folder of files of one of them"
            )
        streaming = self.streaming
        if streaming is None:
            streaming = sum(file.stat().st_size for file in files) > available_on_host()
        names = [str(file) for file in files]
        if kind == "text":
            return _blocks(names)
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"{self.path}: no sample in it")
        with _understood(Path(self.path)):
            more = _as_strings(names[0]) if kind == "csv" else {}
            return getattr(Dataset, f"from_{kind}")(names, streaming=streaming, **more)

    def _images(self, folder: Path) -> Any:
        """A folder of images or of folders with the names of their classes; None for another."""
        from datasets import load_dataset

        there = {path.parent for path in folder.rglob("*") if path.suffix.lower() in _IMAGES}
        if not there - {folder} and any(_kind(path) for path in folder.iterdir()):
            return None  # files of data, and pictures beside them
        if not there:
            return None
        # Of one class datasets makes no label by itself: it might be the name of a split.
        alike = folder not in there and len({len(path.parts) for path in there}) == 1
        classes = alike and not {path.name for path in there} <= _SPLITS
        with _understood(folder):
            return load_dataset(
                "imagefolder",
                data_dir=str(folder),
                split=self.split,
                drop_labels=False if classes else None,
            )

    def _downloaded(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(
                str(self.path),
                self.subset,
                split=self.split,
                revision=self.revision,
                streaming=bool(self.streaming),
            )
        except Exception as error:  # of as many kinds as there are places to fail at
            raise ValueError(
                f"no data set {str(self.path)!r}: neither a path here, nor found on the Hub or in "
                f"its cache ({type(error).__name__}: {error})"
            ) from error


def draw(source: Source, samples: int | None, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of ``samples`` rows drawn from all, in their order; None for all.

    Row i has the i-th uniform number of the seed, and the least ones are drawn: each set of rows is
    as likely, and the same is drawn whether the rows are streamed or not. Of a streamed data set on
    the Hub, which is not read to its end for that, rows come from a shuffled buffer instead.
    """
    from datasets import IterableDataset

    rows = source.rows()
    with _understood(Path(source.path)):
        if samples is None:
            found: Iterator[tuple[int, dict[str, Any]]] = enumerate(rows)
        elif not isinstance(rows, IterableDataset):
            found = _chosen(rows, samples, seed)
        elif source.on_hub:
            found = enumerate(rows.shuffle(seed=seed, buffer_size=_BUFFER).take(samples))
        else:
            found = _least(rows, samples, seed)
        for index, row in found:
            yield f"{source.path}, row {index + 1}", row


def _chosen(rows: Any, samples: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import numpy

    numbers = numpy.random.default_rng(seed).random(len(rows))
    # Ties are as good as impossible; stable, they fall as in _least.
    indices = sorted(map(int, numpy.argsort(numbers, kind="stable")[:samples]))
    for start in range(0, len(indices), _CHUNK):
        part = indices[start : start + _CHUNK]
        yield from zip(part, rows.select(part), strict=True)


def _least(rows: Any, samples: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import numpy

    generator = numpy.random.default_rng(seed)
    kept: list[tuple[float, int, dict[str, Any]]] = []  # a heap, the largest number first
    for index, row in enumerate(rows):
        entry = (-generator.random(), -index, row)
        if len(kept) < samples:
            heapq.heappush(kept, entry)
        elif entry[:2] > kept[0][:2]:
            heapq.heapreplace(kept, entry)
    yield from sorted(((-index, row) for _, index, row in kept), key=lambda pair: pair[0])


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def _saved(folder: Path, split: str) -> Any:
    """What ``save_to_disk`` wrote into a folder, None for another one."""
    from datasets import DatasetDict, load_from_disk

    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    with _understood(folder):
        found = load_from_disk(str(folder))
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise ValueError(f"{folder}: no split {split!r}; found {', '.join(found)}")
    return found[split]


def _files_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if _kind(path) is not None)
    if not files:
        raise ValueError(
            f"{folder}: no data in it; expected what save_to_disk writes, or files of one kind "
            f"({', '.join(KINDS)})"
        )
    return files


def _as_strings(file: str) -> dict[str, Any]:
    """How a csv is read with its cells as they are: no numbers, nothing missing."""
    import pandas
    from datasets import Features, Value

    columns = pandas.read_csv(file, nrows=0).columns
    features = Features({str(name): Value("string") for name in columns})
    return {"features": features, "keep_default_na": False}


def _blocks(files: list[str]) -> Any:
    """The blocks between blank lines, one row each; the lines, in files without a blank one."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(_texts, gen_kwargs={"files": files})


def _texts(files: list[str]) -> Iterator[dict[str, str]]:
    from datasets import Dataset

    def lines(file: str) -> Iterator[str]:
        for row in Dataset.from_text(file, streaming=True, encoding="utf-8"):
            yield row["text"].removeprefix("\ufeff").rstrip()

    for file in files:
        in_blocks = _has_blank_line(lines(file))
        block: list[str] = []
        for line in lines(file):
            if line:
                block.append(line)
            if block and not (line and in_blocks):
                yield {"text": "\n".join(block)}
                block = []
        if block:
            yield {"text": "\n".join(block)}


def _has_blank_line(lines: Iterator[str]) -> bool:
    """Whether there is one between two that are not blank."""
    text = blank = False
    for line in lines:
        if line and blank:
            return True
        text = text or bool(line)
        blank = text and not line
    return False


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """The many errors of a file that cannot be read, as a ValueError that names it."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(_said(path, error.__cause__ or error)) from error


def _said(path: Path, error: BaseException) -> str:
    """What is wrong with a file: the line, where it is made of lines of JSON."""
    if "corresponds to no data" in str(error):
        return f"{path}: no sample in it"
    where = _bad_line(path) if path.is_file() and ".jsonl" in path.name.lower() else None
    return where or f"{path}: unreadable: {type(error).__name__}: {error}"


def _bad_line(path: Path) -> str | None:
    """The first line that is no JSON object, and why."""
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip() and not isinstance(json.loads(raw.rstrip()), Mapping):
                    return f"{path}, line {number}: expected a JSON object"
    except UnicodeDecodeError as error:
        return f"{path}, line {number}: not UTF-8: {error.reason} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
    except (EOFError, zlib.error, OSError) as error:
        return f"{path}, after line {number}: damaged: {error}"
    return None
