"""The tables of docs/evidence.md are those of the CSV files beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from effect import answers, tables
from effect.lines import read_lines
from effect.records import Record

ROOT = Path(__file__).parents[2]


def blocks(text: str) -> list[list[str]]:
    """The tables of a Markdown page, by their lines."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def test_tables_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    tables.main([str(ROOT / "benchmarks/results/effect")])
    made = blocks(capsys.readouterr().out)
    page = blocks((ROOT / "docs/evidence.md").read_text())
    of_results = [block for block in page if block[0] in {each[0] for each in made}]
    assert len(of_results) >= 12  # the second round's nine tasks, and what each is compared with
    for block in of_results:
        assert block in made, block[2]


def test_right_answers_are_those_of_their_file() -> None:
    records = read_lines(ROOT / "benchmarks/results/effect/answers/gsm8k.csv", Record)
    lines = ["| " + " | ".join(row) + " |" for row in answers.rows(records)]
    page = blocks((ROOT / "docs/evidence.md").read_text())
    assert lines in [block[2:] for block in page]
