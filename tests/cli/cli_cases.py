"""Calls of the command line, and what is read of their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from filet.cli.main import main

WORDS = "the a cat dog bird sees hears finds and one two red blue small old house tree".split()


def sentence(number: int) -> str:
    """Words that differ from one number to the next, 4 to 12 of them."""
    return " ".join(WORDS[(number * 7 + k * k * (number + 3)) % 17] for k in range(4 + number % 9))


def arguments(*values: Any) -> list[str]:
    return [str(value) for value in values]


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run what must fail; its one line of error."""
    capsys.readouterr()
    assert main(argv) == 1
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("filet: error: ")
    ]
    assert len(lines) == 1
    return lines[0]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def without_data(argv: list[str]) -> list[str]:
    """The arguments but those that say what data are read."""
    left = list(argv)
    for option in ("--data", "--max-length"):
        at = left.index(option)
        del left[at : at + 2]
    return left
