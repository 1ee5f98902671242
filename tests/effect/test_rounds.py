"""What a round still lacks, the files that it is read from, and the tables made of them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ttest_rel

from effect.plan import CONTROLS, FIRST, SCALES, best, first_round, second_round, step
from effect.records import Record, Run, append, read
from effect.run import belongs, chunk, subtracts
from effect.tables import compared, paired, tuned
from effect.tasks import order
from effect.train import Member

RATES = [1e-3, 3.162e-3, 1e-2]


def record(run: Run, loss: float, general: float = 4.0) -> Record:
    result = {"loss": loss, "middle": loss, "general": general, "accuracy": math.nan}
    return Record.of(run, steps=250, device="CPU", **result)


def played(rounds, valley: dict[str, float]) -> list[Record]:
    """A round until it lacks nothing: the loss is least at the method's rate."""
    records: list[Record] = []
    for _ in range(50):
        wanted = rounds(records)
        if not wanted:
            return records
        for run in wanted:
            away = math.log10(run.member.rate / valley.get(run.member.method, 3.162e-3))
            records.append(record(run, 1 + abs(away) + run.member.seed / 100))
    raise AssertionError("the round does not end")


@pytest.mark.parametrize("least", [3.162e-5, 1e-3, 3.162e-3, 1e-2, 0.1])
def test_rates_are_extended_until_the_best_is_inside(least):
    records = played(lambda r: first_round(r, "task", ["pissa"]), {"pissa": least})
    of = [r for r in records if r.method == "pissa" and r.scale == 1]
    rates = sorted(r.rate for r in of)
    assert len(set(rates)) == len(rates) and set(RATES) <= set(rates)
    assert min(rates) < least < max(rates)
    assert best(of)["task", ("pissa", 1.0, 1.0, 0.0)][0] == pytest.approx(least, rel=1e-3)


def test_rates_begin_where_they_are_asked_to():
    wanted = first_round([], "task", ["pissa"], [1e-4, 3e-4])
    assert {r.member.rate for r in wanted} == {1e-4, 3.162e-4}


def test_a_run_that_diverged_is_the_worst():
    runs = [Run("task", Member("pissa", rate)) for rate in RATES]
    records = [record(runs[0], 2.0), record(runs[1], 1.0), record(runs[2], math.nan)]
    wanted = [r for r in first_round(records, "task", ["pissa"]) if r.member.scale == 1]
    assert [r for r in wanted if r.member.method == "pissa"] == []


def test_the_first_round_has_every_method_at_every_scale_and_the_controls():
    wanted = {
        (r.member.method, r.member.scale, r.member.ratio, r.member.decay)
        for r in first_round([], "task")
    }
    methods = {(m, s, 1.0, 0.0) for m in FIRST for s in SCALES} - {("kasa", 2.0, 1.0, 0.0)}
    assert wanted == methods | set(CONTROLS)


def test_the_second_round_takes_the_best_at_their_better_scale_and_all_seeds():
    methods = ["pissa", "filet-M.fisher.relative.zero", "filet-P.fisher.relative.zero"]
    worse = {"filet-P.fisher.relative.zero": 5.0, "pissa": 0.05}
    records = played(lambda r: first_round(r, "a", ["lora", *methods]), {})
    records = [
        record(r.run, r.loss + worse.get(r.method, 0) + (r.scale == 1) / 10) for r in records
    ]
    first = list(records)
    wanted = second_round(records, {"a": "a", "b": "a"}, range(3), count=1)
    of = {(r.member.method, r.member.scale) for r in wanted if r.member.method != "lora"}
    assert of == {("pissa", 2.0), ("filet-M.fisher.relative.zero", 2.0)}
    assert {r.task for r in wanted} == {"a", "b"} and {r.member.seed for r in wanted} == {0, 1, 2}
    done = {r.run for r in first}
    assert not done & set(wanted)  # what the first round has is not run again


def test_rates_are_the_same_number_however_they_are_reached():
    assert step(step(1e-3, 1), 1) == 1e-2 and step(step(1e-2, -3), 3) == 1e-2


def test_files_are_read_as_they_were_written(tmp_path):
    runs = [Run("task", Member("pissa", 1e-3, 2.0, 4.0, 0.3, seed)) for seed in range(3)]
    records = [record(run, 1.5 + run.member.seed) for run in runs]
    append(tmp_path / "a.csv", records[:1])
    append(tmp_path / "a.csv", records[1:2])
    append(tmp_path / "b.csv", records[2:])
    found = read(tmp_path)
    assert [r.run for r in found] == runs and [r.loss for r in found] == [1.5, 2.5, 3.5]
    (tmp_path / "c.csv").write_text("task,loss\n")
    with pytest.raises(ValueError, match="columns"):
        read(tmp_path)


def test_intervals_are_those_of_a_paired_test():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 5, generator=generator, dtype=torch.float64).tolist()
    records = [
        record(Run("task", Member(method, 1e-3, seed=seed)), loss)
        for method, of in zip(("lora", "pissa"), losses, strict=True)
        for seed, loss in enumerate(of)
    ]
    found = tuned(records, "task")
    lora, pissa = (found[method, 1.0, 1.0, 0.0] for method in ("lora", "pissa"))
    interval, truth = paired(pissa, lora), ttest_rel(losses[1], losses[0]).confidence_interval(0.95)
    assert interval.mean - interval.half == pytest.approx(truth.low)
    assert interval.mean + interval.half == pytest.approx(truth.high)
    rows = compared(found, 5)
    assert {row[0] for row in rows} == {"lora", "pissa"} and all("edge" in row[1] for row in rows)


def test_a_population_is_of_one_kind_of_start_and_task():
    methods = ["lora", "pissa", "contrast.d0.01", "contrast.d0.01.untouched", "filet-M.x.zero"]
    assert [subtracts(m) for m in methods] == [False, True, False, True, False]
    runs = [Run(t, Member(m, 1e-3, seed=s)) for s in (1, 0) for t in "ab" for m in methods]
    found = chunk(runs, 5)
    assert {r.task for r in found} == {"a"} and not any(subtracts(r.member.method) for r in found)
    assert [r.member.seed for r in found] == [0, 0, 0, 1, 1]
    assert len({belongs(r) for r in runs if r.member.method == "pissa"}) == 1


def test_an_order_is_the_seeds_and_has_every_row_once_an_epoch():
    rows = [(torch.full((3 + i % 7,), i), torch.zeros(3 + i % 7)) for i in range(32)]

    def numbers(seed):
        return [[int(row[0][0]) for row in batch] for batch in order(rows, seed, 4, 8)]

    assert sorted(i for batch in numbers(3) for i in batch) == list(range(32))
    assert numbers(3) == numbers(3) != numbers(4)
    with pytest.raises(ValueError, match="expected at least a batch"):
        order(rows[:3], 0, 4, 1)
