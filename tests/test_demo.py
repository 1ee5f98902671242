"""What the demo is made from and what it says: its texts, its differences, its files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel

import finetune
import python_docs


def test_no_paragraph_is_in_two_files() -> None:
    found = {
        name: {" ".join(part.split()) for text in texts for part in text.split("\n\n")}
        for name, texts in python_docs.split().items()
    }
    assert list(found) == ["python_test", "python_train", "general", "keep"]
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert all(len(paragraphs) > 100 for paragraphs in found.values())


def test_docstrings_are_those_of_the_source() -> None:
    assert "Heap queue algorithm" in python_docs.docstrings("heapq")
    assert (finetune.__doc__ or "?") not in python_docs.docstrings("heapq")
    assert python_docs.docstrings("sys") == ""  # built in: there is no source


def runs(rates: dict[str, float], seeds: int = 4) -> list[finetune.Run]:
    """Losses of two steps, drawn."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for method, rate in rates.items():
        for seed in range(seeds):
            first, last, general = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            run = finetune.Run(method, rate, seed, {1: first, 2: last}, {0: 3.0, 2: last}, {0: 2.0})
            run.general[2], run.seconds_per_step = general, 1.0
            found.append(run)
    return found


def test_intervals_are_those_of_a_paired_test() -> None:
    of = runs({"FILet": 1e-2, "LoRA": 1e-3})
    row = finetune.rows(of)[0]
    for losses, (mean, half) in (("held_out", row.held_out_less), ("general", row.general_less)):
        last = [getattr(run, losses)[2] for run in of]
        truth = ttest_rel(last[:4], last[4:]).confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((truth.low, truth.high))
    assert row.held_out == pytest.approx(sum(run.held_out[2] for run in of[:4]) / 4)


def test_of_several_rates_the_differences_are_to_the_best_of_lora() -> None:
    of = runs({"LoRA": 1e-3}, 1) + runs({"LoRA": 1e-2, "FILet": 1e-2}, 1)
    of[1].held_out[2] = -1.0
    found = finetune.rows(of)
    assert found[1].held_out_less[0] == 0 and math.isnan(found[1].held_out_less[1])
    assert found[0].held_out_less[0] == pytest.approx(of[0].held_out[2] + 1)


def test_every_method_is_drawn_and_listed(tmp_path: Path) -> None:
    of = runs(finetune.RATES)
    finetune.write_csv(tmp_path / "loss.csv", of)
    with (tmp_path / "loss.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    last = [line for line in lines if line["step"] == "2"]
    assert [float(line["general_loss"]) for line in last] == pytest.approx(
        [run.general[2] for run in of], abs=1e-6
    )
    assert {line["held_out_loss"] for line in lines if line["step"] == "1"} == {""}
    finetune.draw(tmp_path / "loss.png", of, finetune.rows(of), "Title", "settings")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
