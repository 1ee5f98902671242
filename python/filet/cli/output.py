"""What the commands write: files, refused early where they would destroy something, and text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filet.system.files import check_place, index_of, inside

__all__ = [
    "Said",
    "check_file_output",
    "check_folder_output",
    "expected_errors",
    "one_line",
    "say",
    "say_entry",
    "say_error",
    "show_warning",
]


def check_folder_output(output: Path, overwrite: bool, inputs: Sequence[Path | None]) -> None:
    """Refuse, before any work, an output folder that would destroy something."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file, not a folder")
    check_place(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--output: {output} is not empty; --overwrite replaces it")
    if not (output / "adapter_config.json").is_file():
        raise ValueError(f"--output: {output} holds no adapter; --overwrite replaces only adapters")
    for path in inputs:
        if path is not None and inside(path, output):
            raise ValueError(f"--output: {output} holds {path}, which is read")


def check_file_output(
    output: Path, overwrite: bool, inputs: Sequence[Path | None], *, option: str
) -> None:
    """Refuse, before any work, an output file that would destroy something."""
    if output.is_dir():
        raise ValueError(f"{option}: {output} is a folder, not a file")
    check_place(output)
    index = index_of(output)  # of statistics in several files
    there = next((path for path in (output, index) if path.exists()), None)
    if there is None:
        return
    if not overwrite:
        raise ValueError(f"{option}: {there} exists; --overwrite replaces it")
    for path in inputs:
        if path is not None and (inside(output, path) or inside(index, path)):
            where = "is" if path.is_file() else f"lies in {path}, which is"
            raise ValueError(f"{option}: {output} {where} also read")


def say(text: str) -> None:
    """Print where the terminal may know ASCII only: names of files can hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def say_entry(label: str, text: object) -> None:
    """A line like those below a report's table: a label, and what is said of it."""
    say(f"{label:<14}{text}")


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"filet: warning: {' '.join(str(message).split())}", file=sys.stderr)


class Said(Exception):
    """Ends a command whose error was printed already."""


def say_error(text: str) -> None:
    print(f"filet: error: {text}", file=sys.stderr, flush=True)


def expected_errors() -> tuple[type[Exception], ...]:
    """What a user can cause; anything else is a bug and keeps its traceback."""
    errors: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        FloatingPointError,
        ImportError,
        MemoryError,
    )
    # Of packages that no error can be of before they are imported.
    for package, name in (("torch", "OutOfMemoryError"), ("safetensors", "SafetensorError")):
        if package in sys.modules:
            errors += (getattr(sys.modules[package], name),)
    return errors


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
