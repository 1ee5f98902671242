"""Statistics of several processes on the disk: each writes what it owns, and an index names all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import filet
from disk import files_up_to
from filet import FiletConfig, Statistics
from filet.report.compare import Comparison
from models import case, loader, peft_of
from ranks import errors, run, values

NAME = "statistics.safetensors"
INDEX = f"{NAME}.index.json"


def shards(count: int) -> list[str]:
    return [f"statistics-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("rank"))


def taken(rank: int, size: int, seed: int = 0) -> Statistics:
    batches = list(loader(case("llama").samples[rank + seed :: size], 3))
    return filet.collect_statistics(
        peft_of(case("llama")), batches, FiletConfig(samples=None), show_progress_bar=False,
        keep=batches,
    )  # fmt: skip


def assert_equal(mine: Statistics, theirs: Statistics) -> None:
    """To the bit."""
    for key in ("fingerprints", "shared_input", "samples", "tokens", "loss_terms", "keep_tokens"):
        assert getattr(mine, key) == getattr(theirs, key), key
    assert mine.keep is not None and theirs.keep is not None
    assert list(mine.moments) == list(theirs.moments)
    for name, its in mine.moments.items():
        other = theirs.moments[name]
        for one, two in (
            (its.input, other.input), (its.output, other.output),
            (mine.keep[name], theirs.keep[name]),
        ):  # fmt: skip
            assert one.space == two.space and int(one.count) == int(two.count)
            assert torch.equal(one.sum.tril(), two.sum.tril()), name


def saved(rank: int, folder: Path, size: int, place: Path) -> Any:
    """What was gathered in the first process, for comparison, and what each read again."""
    statistics = taken(rank, size)
    path = place / "new" / NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Statistics, "whole", None)  # nothing is gathered to be saved
        patch.setattr("filet.collect.statistics.gathered", None)
        statistics.save(path)
    read = Statistics.load(path)
    whole = statistics.whole()
    if whole is not None:
        assert_equal(whole, read)
    applied = filet.apply_statistics(peft_of(case("llama")), read)
    return [its.indices for its in applied.modules.values()], statistics.owners


@pytest.mark.parametrize("size", [2, 3])
def test_each_writes_what_it_owns(size: int, tmp_path: Path) -> None:
    ranks = values(run(size, saved, tmp_path, size, tmp_path))
    owners = ranks[0][1]
    # The model has two blocks: of three processes one owns nothing, and writes nothing.
    names = shards(len(set(owners.values())))
    assert len(names) == 2
    folder = tmp_path / "new"
    assert files(folder) == sorted([*names, INDEX])
    content = json.loads((folder / INDEX).read_text())
    total = 0
    for name, owner in zip(names, sorted(set(owners.values())), strict=True):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():
                assert content["weight_map"].pop(key) == name
                assert owners[key.removeprefix("keep:").rsplit(".", 2)[0]] == owner
                total += file.get_tensor(key).nbytes
    assert not content["weight_map"] and content["metadata"]["total_size"] == total
    # In one process, by name or by index: the same choices as all of them made.
    for path in (folder / NAME, folder / INDEX):
        report = filet.apply_statistics(peft_of(case("llama")), Statistics.load(path))
        for mine, *others in zip(
            [its.indices for its in report.modules.values()], *[found for found, _ in ranks],
            strict=True,
        ):  # fmt: skip
            assert all(torch.equal(mine, each) for each in others)
    alike = Comparison.of(folder / NAME, folder / INDEX)
    assert not alike.adapters and all(its.overlap == pytest.approx(1) for its in alike.modules)


def replaced(rank: int, folder: Path, place: Path) -> None:
    statistics = taken(rank, 2)
    statistics.save(place / NAME)
    if rank == 0:
        (place / NAME).write_bytes(b"an older file")
        first = (place / shards(2)[0]).rename(place / shards(3)[0])  # of an older set of three
        shutil.copy(first, place / shards(3)[2])
        (place / "statistics-00003-of-00004.safetensors").write_bytes(b"of somebody else")
    assert filet.distributed.group.current() is not None
    statistics.save(place / NAME)


def test_what_was_there_before_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    values(run(2, replaced, tmp_path, place))
    theirs = "statistics-00003-of-00004.safetensors"
    assert files(place) == sorted([*shards(2), theirs, INDEX])
    several = Statistics.load(place / NAME)
    several.save(place / NAME)  # by one process: a file, and no set beside it
    assert files(place) == sorted([theirs, NAME])
    assert_equal(several, Statistics.load(place / NAME))
    foreign = place / "model.safetensors.index.json"
    foreign.write_text('{"metadata": {"total_size": 1}, "weight_map": {"a": "b"}}')
    before = foreign.read_bytes()
    several.save(place / "model.safetensors")
    assert foreign.read_bytes() == before
    with pytest.raises(ValueError, match="expected the name of the statistics, not of their index"):
        several.save(place / INDEX)


def failing(rank: int, folder: Path, place: Path) -> list[str]:
    """A disk that is full under the second process; one that it does not see; names in use."""
    statistics, said = taken(rank, 2, seed=1), []

    def attempt(path: Path) -> None:
        try:
            statistics.save(path)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    with files_up_to(5_000) if rank else contextlib.nullcontext():
        attempt(place / NAME)
    is_dir = Path.is_dir
    if rank:
        Path.is_dir = lambda self: not self.name.startswith(".") and is_dir(self)  # type: ignore
    attempt(place / NAME)
    Path.is_dir = is_dir  # type: ignore[method-assign]
    attempt(place / "model.safetensors")
    return said


def test_all_or_none(tmp_path: Path) -> None:
    place = tmp_path / "place"
    values(run(2, saved, tmp_path, 2, place))
    place = place / "new"
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    before = {name: (place / name).read_bytes() for name in files(place)}
    first, second = values(run(2, failing, tmp_path, place))
    full, unseen, used = zip(first, second, strict=True)
    assert f"File too large: '{place / NAME}'" in full[1]
    assert "rank 1: " in full[0] and "File too large" in full[0]
    for said in unseen:
        assert said.startswith(f"ValueError: {place / NAME}: rank 1 does not see what rank 0")
        assert "filet stats --shard" in said and "--merge" in said
    assert all("model.safetensors.index.json is there and no part of" in said for said in used)
    assert {name: (place / name).read_bytes() for name in files(place)} == before
    assert Statistics.load(place / NAME).samples == 12


def killed(rank: int, folder: Path, place: Path) -> None:
    statistics = taken(rank, 2, seed=1)
    if rank:
        kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        filet.collect.written.write_tensors = kill  # type: ignore[assignment]
    statistics.save(place / NAME)


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    ended = run(2, killed, tmp_path, place)
    assert ended[1].exitcode == -signal.SIGKILL
    assert "lost another process" in errors(ended[:1])[0]
    assert files(place) == []


def two_runs(rank: int, folder: Path, place: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        taken(rank, 2, seed=seed).save(place / name / NAME)


def test_a_set_that_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    values(run(2, two_runs, tmp_path, tmp_path))
    one, two = tmp_path / "one", tmp_path / "two"
    first, last = shards(2)

    def refused(match: str, path: Path = one / NAME) -> None:
        with pytest.raises(ValueError, match=match):
            Statistics.load(path)

    refused(f"{first} is one of several files; expected their index, {INDEX}", one / first)
    with pytest.raises(ValueError, match=f"{first} is one of several files"):
        Comparison.of(one / first, two / NAME)
    content = (one / last).read_bytes()
    (one / last).write_bytes(content[:-100])
    refused(f"{last} is not a readable safetensors file")
    (one / last).unlink()
    refused(f"{last} is missing, which .*{INDEX} names")
    shutil.copy(two / last, one / last)
    refused(f"{last} is not of the run that wrote .*{INDEX}; expected the files of one run")
    shutil.copy(one / first, one / last)
    refused(f"{last} has not the tensors that .*{INDEX} says it has")
    index = json.loads((one / INDEX).read_text())
    for change, match in (
        (
            {"weight_map": {"a": "../a.safetensors"}},
            "names '../a.safetensors'; expected files besid",
        ),
        ({"weight_map": None}, f"{INDEX} is not a readable index"),
        ({"metadata": {"total_size": 1}}, "format None; expected 'filet-statistics-1'"),
    ):
        (one / INDEX).write_text(json.dumps(index | change))
        refused(match)
    (one / INDEX).write_text("{")
    refused(f"{INDEX} is not a readable index")
    (one / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=NAME):
        Statistics.load(one / NAME)
