"""The bar of a pass: how many samples there are to come, of what is known of a dataloader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import filet
from filet import FiletConfig
from models import case, collate, peft_of
from ranks import run, values

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 12  # of the case


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(case("llama").samples)


def batches() -> list[Any]:
    return list(DataLoader(case("llama").samples, batch_size=5, collate_fn=collate))


def of_dataset(**more: Any) -> DataLoader[Any]:
    return DataLoader(case("llama").samples, collate_fn=collate, **more)


def drawn() -> DataLoader[Any]:
    """Seven of the samples, by a sampler of their own."""
    samples = case("llama").samples
    sampler = RandomSampler(samples, num_samples=7, generator=torch.Generator().manual_seed(0))
    return of_dataset(batch_sampler=BatchSampler(sampler, 5, drop_last=False))


BARS: dict[str, tuple[Callable[[], Iterable[Any]], int | None, str]] = {
    "list": (batches, 320, "statistics:   0%|          | 0/12"),
    "list, more": (batches, 8, "statistics:   0%|          | 0/8"),
    "list, all": (batches, None, "statistics:   0%|          | 0/12"),
    "dataset": (lambda: of_dataset(batch_size=5), 320, "statistics:   0%|          | 0/12"),
    "dropped": (
        lambda: of_dataset(batch_size=5, drop_last=True), 320, "statistics:   0%|          | 0/10"
    ),
    "sampler": (drawn, 320, "statistics:   0%|          | 0/7"),
    # Items that are batches: how many there are says nothing of their samples.
    "batches": (
        lambda: DataLoader(batches(), batch_size=None),  # type: ignore[arg-type]
        320,
        "statistics, at most 320 samples:   0%|          | 0/320",
    ),
    "stream": (
        lambda: DataLoader(Stream(), batch_size=5, collate_fn=collate),
        320,
        "statistics, at most 320 samples:   0%|          | 0/320",
    ),
    "generator": (lambda: iter(batches()), 320, "statistics, at most 320 samples:"),
    "generator, all": (lambda: iter(batches()), None, "statistics: 0sample"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BARS)
def test_a_bar_counts_to_what_there_is(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, most, expected = BARS[kind]
    statistics = filet.collect_statistics(peft_of(case("llama")), made(), FiletConfig(samples=most))
    first, *_, last = capsys.readouterr().err.strip().split("\r")
    assert expected in first
    assert f"{statistics.samples}/{statistics.samples}" in last


@pytest.mark.parametrize("keep", ["self", "batches"])
def test_a_bar_of_data_to_keep(keep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peft_model = peft_of(case("llama"))
    peft_model.config.bos_token_id = 1
    given, number = (batches()[:1], 5) if keep == "batches" else (keep, 9)
    filet.collect_statistics(peft_model, batches(), FiletConfig(samples=9), keep=given)
    bars = capsys.readouterr().err
    assert f"data to keep:   0%|          | 0/{number}" in bars and "at most" not in bars


def of_two(rank: int, folder: Path) -> str:
    """What a process shows of its share, of which each has a half."""
    from contextlib import redirect_stderr
    from io import StringIO

    torch.set_num_threads(1)
    own = batches()[0] if rank else batches()[1]
    with redirect_stderr(StringIO()) as shown:
        filet.collect_statistics(peft_of(case("llama")), [own])
    return shown.getvalue()


def test_a_bar_of_one_process_says_whose_it_is(tmp_path: Path) -> None:
    first, second = values(run(2, of_two, tmp_path))
    assert "rank 0 of 2: FILet statistics:   0%|          | 0/5" in first
    assert not second
