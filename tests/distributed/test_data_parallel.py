"""Statistics, choices and adapters of several processes beside those of one with all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import filet
from alike import assert_as_one, assert_same
from filet import FiletConfig
from filet.distributed.triangles import pack, packed_size, unpack
from models import Case, Experts, case, collate, linears, loader, peft_of, randomised, truth
from ranks import run, values

# Of each rank, its samples. One with few, and one without any.
SPLITS = {2: (range(0, 7), range(7, 12)), 3: (range(0, 8), range(8, 12), range(0))}


def batches_of(kind: str, rank: int, size: int) -> list[Any]:
    samples = case(kind).samples
    return list(loader([samples[index] for index in SPLITS[size][rank]], 3))


def outcome(report: Any, model: Any) -> dict[str, Any]:
    """What all ranks have to have alike, and what is compared with one process."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return {
        "energies": {name: its.energies for name, its in report.modules.items()},
        "indices": {name: its.indices for name, its in report.modules.items()},
        "factors": {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n},
        "left": report.left_default,
        "counts": (report.samples, report.tokens, report.loss_terms),
        "tokens": [(its.input_tokens, its.output_tokens) for its in report.modules.values()],
        "shared": [its.shared_input for its in report.modules.values()],
        "seconds": report.seconds,
        "peak": report.peak_memory,
    }


def case_of(kind: str) -> Case:
    """The case; of the experts a new one, with biases that no other test has drawn."""
    if kind != "experts":
        return case(kind)
    torch.manual_seed(0)
    model = randomised(Experts())
    return Case(model, [], linears(model, "head"))


def initialised(kind: str, batches: Any, wrapped: bool = False, **config: Any) -> dict[str, Any]:
    c = case_of(kind)
    torch.manual_seed(3)
    model: Any = peft_of(c)
    if wrapped:
        model = DistributedDataParallel(model)
    keep = config.pop("keep", None)
    report = filet.initialize_lora_filet_weights(
        model, batches, FiletConfig(**config), forward_fn=c.forward_fn, keep=keep,
        show_progress_bar=False,
    )  # fmt: skip
    return outcome(report, model)


def on_rank(rank: int, folder: Path, kind: str, size: int, kept: bool, config: Any) -> Any:
    batches = batches_of(kind, rank, size)
    if kept:  # the other way round: who has no sample of the task has some to keep
        config = {**config, "keep": batches_of(kind, size - 1 - rank, size)}
    return initialised(kind, batches, wrapped=size == 2 and not kept, **config)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_ranks_equal_one(size: int, start: str, tmp_path: Path) -> None:
    config = {"start": start, "samples": None}
    many = values(run(size, on_rank, tmp_path, "llama", size, False, config))
    one = initialised("llama", list(loader(case("llama").samples, 3)), **config)
    assert_as_one(many, one)
    expected = truth("llama")  # by float64, which knows nothing of the library
    for name, energies in many[0]["energies"].items():
        torch.testing.assert_close(energies, expected[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("passes", [1, 2])
def test_data_to_keep(passes: int, tmp_path: Path) -> None:
    config = {"samples": 12, "passes": passes}
    settings = {**config, "samples": None}
    many = values(run(3, on_rank, tmp_path, "llama", 3, True, settings, launched=True))
    batches = list(loader(case("llama").samples, 3))
    one = initialised("llama", batches, keep=batches, **config)
    assert_as_one(many, one)


def on_rank_by_itself(rank: int, folder: Path) -> Any:
    return initialised("llama", batches_of("llama", rank, 2), keep="self", samples=40)


def test_texts_of_the_model_itself(tmp_path: Path) -> None:
    many = values(run(2, on_rank_by_itself, tmp_path))
    batches = list(loader(case("llama").samples, 3))
    assert_as_one(many, initialised("llama", batches, keep="self", samples=40))


def on_rank_of_experts(rank: int, folder: Path) -> Any:
    return initialised("experts", expert_batches()[rank], samples=None)


def expert_batches() -> list[list[Any]]:
    """The first rank's tokens go to two experts, the second's to the third and one of those."""
    ids = torch.arange(3, 27).view(4, 6)
    first, second = ids - ids % 3 + ids % 2, ids - ids % 3 + 1 + ids % 2
    return [[{"input_ids": each, "labels": each}] for each in (first, second)]


def test_experts_that_a_rank_did_not_reach(tmp_path: Path) -> None:
    many = values(run(2, on_rank_of_experts, tmp_path))
    one = initialised("experts", [b for its in expert_batches() for b in its], samples=None)
    assert {name.split(".")[1] for name in one["left"]} == {"3"}  # which none did
    assert_as_one(many, one)


def saved(rank: int, folder: Path) -> Any:
    c = case("llama")
    statistics = filet.collect_statistics(
        peft_of(c), batches_of("llama", rank, 2), FiletConfig(samples=None),
        show_progress_bar=False,
    )  # fmt: skip
    statistics.save(folder / "statistics.safetensors")
    torch.manual_seed(3)
    model, again = peft_of(c), peft_of(c)
    report = filet.apply_statistics(model, statistics)
    loaded = filet.Statistics.load(folder / "statistics.safetensors")
    read = filet.apply_statistics(again, loaded)
    here = {name for name, its in statistics.moments.items() if not its.output.sum.is_meta}
    with pytest.raises(ValueError, match="lie on other processes than these"):
        statistics.merge(loaded)
    twice = statistics.merge(statistics)
    count = [int(its.input.count) for its in twice.moments.values()]
    return here, statistics.owners, count, outcome(report, model), outcome(read, again)


def test_statistics_have_owners_and_a_file_has_all(tmp_path: Path) -> None:
    ranks = values(run(2, saved, tmp_path))
    owners = ranks[0][1]
    assert owners == ranks[1][1] and set(owners.values()) == {0, 1}
    for rank, (here, *_) in enumerate(ranks):
        assert here == {name for name, owner in owners.items() if owner == rank}
    one = filet.collect_statistics(
        peft_of(case("llama")), loader(case("llama").samples, 3), FiletConfig(samples=None),
        show_progress_bar=False,
    )  # fmt: skip
    file = filet.Statistics.load(tmp_path / "statistics.safetensors")
    assert file.fingerprints == one.fingerprints and file.shared_input == one.shared_input
    assert list(file.moments) == list(one.moments) and file.owners is None
    for name, its in one.moments.items():
        read = file.moments[name]
        for mine, theirs in ((its.input, read.input), (its.output, read.output)):
            assert mine.space == theirs.space and int(mine.count) == int(theirs.count)
            lower = mine.sum.tril()
            torch.testing.assert_close(theirs.sum, lower, rtol=1e-5, atol=1e-5 * float(lower.max()))
    for _, _, count, applied, read in ranks:
        assert count == [2 * int(its.input.count) for its in one.moments.values()]
        for key in ("factors", "energies", "indices"):
            assert_same(applied[key], ranks[0][3][key], key)
            assert_same(read[key], ranks[0][4][key], key)
        assert_same(applied["indices"], read["indices"], "indices")


def shares(rank: int, folder: Path) -> Any:
    """How many samples each rank takes, of 9 in common or of its sampler's own."""
    c = case("llama")

    def taken(batches: Any, samples: int | None) -> tuple[int, int]:
        seen = []

        def forward(model: Any, batch: Any) -> Any:
            seen.append(batch["input_ids"].shape[0])
            return model(**batch)

        statistics = filet.collect_statistics(
            peft_of(c), batches, FiletConfig(samples=samples), forward_fn=forward,
            show_progress_bar=False,
        )  # fmt: skip
        return sum(seen), statistics.samples

    from accelerate.data_loader import prepare_data_loader

    eleven = c.samples[:11]
    sampler = DistributedSampler(eleven, 2, rank, shuffle=True, seed=1)
    dealt = DataLoader(eleven, 2, sampler=sampler, collate_fn=collate)
    found = [taken(list(loader(c.samples, 2)), 9), taken(dealt, None)]
    for split in (False, True):
        prepared = prepare_data_loader(
            loader(eleven, 4), num_processes=2, process_index=rank, split_batches=split
        )
        found.append(taken(prepared, None))
    return found


def test_shares_of_samples(tmp_path: Path) -> None:
    first, second = values(run(2, shares, tmp_path))
    assert [total for _, total in first] == [9, 11, 11, 11]
    assert [total for _, total in second] == [9, 11, 11, 11]
    assert [mine for mine, _ in first] == [5, 6, 7, 6]
    assert [mine for mine, _ in second] == [4, 5, 4, 5]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_triangles(n: int, dtype: torch.dtype) -> None:
    square = torch.randn(n, n, dtype=dtype)
    lower = square.tril()
    square += torch.full_like(square, torch.nan).triu(1)  # undefined there
    flat = torch.empty(packed_size(n), dtype=dtype)
    pack(square, flat)
    assert torch.equal(flat.sort().values, lower[torch.ones(n, n).tril().bool()].sort().values)
    again = torch.full_like(square, torch.nan)
    unpack(flat, again)
    assert torch.equal(again.tril(), lower)
