"""A block's largest modules, whose energies several processes compute, each of some columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import assert_equal, assert_same_adapter, initialize, model_folder

import filet
import models
from filet import FiletConfig, FiletReport
from filet.collect.together import columns_of, holders_by_cost
from filet.select import Divided
from ranks import errors, run, values

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")


@dataclass
class Sized:
    """Of a group its size; of a target its shape."""

    size: int = 1
    shape: tuple[int, int] = (1, 1)


LLAMA_70B = {
    "q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192),
    "gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672),
}  # fmt: skip
MILLISECONDS = {"q": 11.4, "o": 11.4, "k": 2.4, "v": 2.4, "gate": 12.2, "up": 12.2, "down": 35.2}


@pytest.mark.parametrize(("size", "most"), [(1, 88), (2, 48), (3, 31), (4, 24), (8, 12.5)])
def test_no_rank_has_much_more_than_its_share(size: int, most: float) -> None:
    """By what the layers take on an H100 (docs/kernels.md), a Gram matrix for each part."""
    targets: Any = {name: Sized(shape=shape) for name, shape in LLAMA_70B.items()}
    shared = {"k": "q", "v": "q", "up": "gate"}
    group: Any = Sized(size)
    holders = holders_by_cost(group, targets, shared, False)
    loads = [0.0] * size
    for name, ranks in holders.items():
        n = LLAMA_70B[name][1]
        gram = 1.2 if ranks[1:] else 0
        columns = columns_of(ranks, n)
        assert list(columns) == list(ranks) and len(set(ranks)) == len(ranks)
        covered = [at for its in columns.values() for at in range(its.start, its.stop)]
        assert covered == list(range(n))
        for rank, its in columns.items():
            assert its.start % 128 == 0
            loads[rank] += gram + (MILLISECONDS[name] - gram) * (its.stop - its.start) / n
    assert max(loads) <= most
    assert len(holders["down"]) == {1: 1, 2: 1, 3: 2, 4: 2, 8: 4}[size]
    one = holders_by_cost(group, targets, shared, True)  # a decomposition is one rank's
    assert all(len(ranks) == 1 for ranks in one.values())
    assert one["q"] == one["k"] == one["v"] and one["gate"] == one["up"]


@pytest.mark.parametrize("n", [1, 3, 127, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_column_is_one_rank_s(n: int, count: int) -> None:
    columns = columns_of(range(count), n)
    assert [at for its in columns.values() for at in range(its.start, its.stop)] == list(range(n))


def batches(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    return list(models.loader(models._text(1)[rank::size], 3))


def initialise(folder: Path, output: Path, rank: int, size: int, config: FiletConfig) -> Any:
    FiletReport.plot = lambda report, path: Path(path).touch()  # type: ignore[method-assign]
    return initialize(folder, output, batches=batches(rank, size), config=config)


def on_rank(rank: int, folder: Path, model: Path, config: FiletConfig, fails: bool) -> Any:
    """All modules but the first one are divided, between two ranks or three."""

    def everyone(group: Any, targets: Any, *, shared_input: Any, contrast: bool) -> Any:
        ranks = [(0,), (1, 2), (2, 0, 1), (0, 1), (2, 1)]
        return {name: ranks[number % 5] for number, name in enumerate(targets)}

    filet.blockwise.work.holders_by_cost = everyone  # type: ignore[assignment]
    joined, seen = Divided.joined, {}

    def noted(self: Divided, energies: Any) -> Any:
        seen.update({name: list(its) for name, its in self.columns.items()})
        if fails and rank:
            raise FloatingPointError("no number")
        return joined(self, energies)

    Divided.joined = noted  # type: ignore[method-assign]
    return initialise(model, folder / "many", rank, 3, config), seen


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", FiletConfig(samples=None, start="untouched")),
        ("llama", FiletConfig(samples=None, select="max", normalization="sum")),
        ("gpt2", FiletConfig(samples=None)),
    ],
    ids=["untouched", "max", "gpt2"],
)
def test_parts_equal_the_whole(kind: str, config: FiletConfig, tmp_path: Path) -> None:
    model = model_folder(kind)
    many = values(run(3, on_rank, tmp_path, model, config, False))
    one = initialise(model, tmp_path / "one", 0, 1, config)
    for report, divided in many:
        assert len(divided) >= len(one.modules) / 2
        assert {len(ranks) for ranks in divided.values()} == {2, 3}
        assert_equal(report, one, 1e-5)
        assert_equal(report, many[0][0], 0)
    assert_same_adapter(tmp_path / "many", tmp_path / "one", 1e-5)


def test_a_failure_is_heard_of(tmp_path: Path) -> None:
    config = FiletConfig(samples=None)
    first, second, third = errors(run(3, on_rank, tmp_path, model_folder("llama"), config, True))
    assert first == "FloatingPointError: rank 1: no number"
    assert "no number" in second and "no number" in third
    assert not (tmp_path / "many").exists()
