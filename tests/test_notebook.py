"""examples/filet.ipynb: it runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

PATH = Path(__file__).parents[1] / "examples" / "filet.ipynb"


def shown(cells: list[Any]) -> tuple[str, dict[str, str]]:
    """What is printed, and by its kind the last thing that is displayed."""
    printed, displayed = "", {}
    for output in (each for cell in cells for each in cell.get("outputs", [])):
        printed += output.get("text", "")
        displayed |= output.get("data", {})
    return printed, displayed


def test_it_is_kept_without_outputs() -> None:
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_it_goes_from_data_to_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FILET_MODEL", raising=False)
    book = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    printed, displayed = shown(book.cells)
    assert "96 samples" in printed
    first, last = map(float, re.findall(r"tiny model's loss: (\S+) → (\S+)", printed)[0])
    assert last < first - 1  # it is a model of something by now
    before, after = map(float, re.findall(r"held out: (\S+) → (\S+)", printed)[0])
    assert after < before - 0.02
    assert float(re.findall(r"loaded: (\S+)", printed)[0]) == after
    assert base64.b64decode(displayed["image/png"]).startswith(b"\x89PNG")
    assert "initialised by FILet" in displayed["text/markdown"]
    assert "8 in each of 28 modules" in displayed["text/markdown"]
