"""Files of text into samples, prompt and response apart."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FIELD_PAIRS", "SUFFIXES", "Sample", "read_samples"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
"""What :func:`read_samples` reads, told apart by the file's name."""

FIELD_PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Fields looked for, in this order, when none is named and there is no ``text``."""

_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Sample:
    """One training text: a prompt and what should follow it, or a text alone.

    Attributes:
        prompt: the prompt, or the whole text where ``response`` is None.
        response: the part that follows the prompt, or None.
    """

    prompt: str
    response: str | None = None


def read_samples(
    path: str | os.PathLike[str],
    *,
    text_field: str | None = None,
    prompt_field: str | None = None,
    response_field: str | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """Read samples from a text file, in the file's order.

    - ``.txt``: UTF-8. Blocks separated by blank lines are samples (paragraphs; line breaks inside
      a block are kept). In a file without a blank line between lines, every line is a sample.
    - ``.jsonl``, ``.jsonl.gz``: one JSON object a line, UTF-8; blank lines are skipped.
    - ``.parquet``: one row a sample; needs pyarrow.

    Fields of the last two: those named, else ``text``, else ``prompt`` and ``completion``, else
    ``question`` and ``answer``, else ``instruction`` and ``output`` (with ``input``, where it is
    there and not empty, appended to the instruction on a new line). The first record decides.

    Args:
        path: the file; its suffix says what it is.
        text_field: field that holds a whole text.
        prompt_field: field that holds the prompt; excludes ``text_field``.
        response_field: field that holds what follows the prompt; needs ``prompt_field``.
        limit: read at most this many samples, from the start of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file is parquet and pyarrow is not installed.
        ValueError: an unknown suffix, an empty file, bytes that are not UTF-8, a line that is not
            a JSON object, a missing field, a value that is not a string; the message names the
            file, the line or row, and the field.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    named = _named_fields(text_field, prompt_field, response_field)
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown suffix, expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")

    if name.endswith(".txt"):
        if named is not None:
            raise ValueError(f"{path}: a .txt file has no fields")
        samples = [Sample(text) for text in _text_blocks(path)][:limit]
    else:
        records = _parquet_rows(path) if name.endswith(".parquet") else _json_lines(path)
        samples = list(itertools.islice(_samples(records, named), limit))
    if not samples:
        raise ValueError(f"{path}: no sample in it")
    return samples


@dataclass(frozen=True)
class _Fields:
    """Which fields of a record make a sample."""

    prompt: str
    response: str | None = None
    context: str | None = None  # appended to the prompt where it is there and not empty

    def read(self, where: str, record: Mapping[str, Any]) -> Sample:
        prompt = _string(where, record, self.prompt)
        if self.context is not None and record.get(self.context):
            prompt += "\n" + _string(where, record, self.context)
        return Sample(prompt, self.response and _string(where, record, self.response))


def _named_fields(
    text_field: str | None, prompt_field: str | None, response_field: str | None
) -> _Fields | None:
    """The fields that the caller names, None for none."""
    if text_field is not None and (prompt_field is not None or response_field is not None):
        raise ValueError("text_field excludes prompt_field and response_field")
    if response_field is not None and prompt_field is None:
        raise ValueError("response_field needs prompt_field")
    if text_field is not None:
        return _Fields(text_field)
    return None if prompt_field is None else _Fields(prompt_field, response_field)


def _samples(
    records: Iterable[tuple[str, Mapping[str, Any]]], named: _Fields | None
) -> Iterator[Sample]:
    """A sample of every record, from the named fields or those that the first record has."""
    fields = named
    for where, record in records:
        if fields is None:
            fields = _known_fields(where, record)
        yield fields.read(where, record)


def _known_fields(where: str, record: Mapping[str, Any]) -> _Fields:
    """The fields of a record that are looked for when the caller names none."""
    if "text" in record:
        return _Fields("text")
    for prompt, response in FIELD_PAIRS:
        if prompt in record and response in record:
            return _Fields(prompt, response, "input" if prompt == "instruction" else None)
    wanted = ", ".join(["'text'", *(f"'{first}' + '{second}'" for first, second in FIELD_PAIRS)])
    raise ValueError(
        f"{where}: no known fields: looked for {wanted}; found {_names(record)}; "
        "name the field of the text, or those of the prompt and the response"
    )


def _string(where: str, record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f"{where}: no field '{field}'; found {_names(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{field}' must be a string, got {type(value).__name__}")
    return value


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in record) or "none"


def _text_blocks(path: Path) -> list[str]:
    with path.open("rb") as file:
        lines = [line.rstrip() for _, line in _decoded_lines(path, file)]
    text = "\n".join(lines).strip("\n")
    if "\n\n" not in text:
        return text.split("\n") if text else []
    return [block.strip("\n") for block in text.split("\n\n") if block.strip()]


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    compressed = path.name.lower().endswith(".gz")
    with gzip.open(path, "rb") if compressed else path.open("rb") as file:
        for where, line in _decoded_lines(path, file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not valid JSON: {error.msg} at column {error.colno}"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record


def _decoded_lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """(place for messages, text) of every line, without its end."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
                ) from error
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield where, line.rstrip("\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip file: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs pyarrow: pip install 'filet-kernels[frontend]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, after row {number}: unreadable parquet: {error}") from error
