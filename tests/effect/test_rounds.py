"""What a round still lacks, the files that it is read from, and the tables made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from made_up import played, record, valley
from scipy.stats import ttest_rel

from effect.plan import (
    CONTROLS,
    DEFAULT,
    FIRST,
    KEEP,
    SCALES,
    SECOND,
    best,
    first_round,
    given_round,
    second_round,
    step,
)
from effect.records import Record, Run, append, read
from effect.tables import FORMS, at_equal_loss, at_magnitudes, compared, main, paired, tuned
from effect.tasks import causal_task, order
from effect.train import Member
from effect.workers import chunks, subtracts, trained
from made_data import Letters, write_jsonl

RATES = [1e-3, 3.162e-3, 1e-2]


@pytest.mark.parametrize("least", [3.162e-5, 1e-3, 3.162e-3, 1e-2, 0.1])
def test_rates_are_extended_until_the_best_is_inside(least):
    records = played(lambda r: first_round(r, "task", ["pissa"]), partial(valley, least=least))
    of = [r for r in records if r.method == "pissa" and r.scale == 1]
    rates = sorted(r.rate for r in of)
    assert len(set(rates)) == len(rates) and set(RATES) <= set(rates)
    assert min(rates) < least < max(rates)
    assert best(of)["task", ("pissa", 1.0, 1.0, 0.0)][0] == pytest.approx(least, rel=1e-3)


def test_rates_begin_where_they_are_asked_to():
    wanted = first_round([], "task", ["pissa"], rates=[1e-4, 3e-4])
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


def test_the_second_round_has_every_seed_around_each_variants_own_rate():
    least = {"lora": 3.162e-3, "pissa": 1e-3}
    first = played(
        lambda r: first_round(r, "a", ["lora", "pissa"], scales=[1.0]),
        lambda run: valley(run, least[run.member.method]),
    )
    first += played(
        lambda r: first_round(r, "b", ["pissa"], scales=[1.0]), partial(valley, least=1e-2)
    )
    variants = [("lora", 1.0, 1.0, 0.0), ("pissa", 1.0, 1.0, 0.0), ("olora", 1.0, 1.0, 0.0)]
    wanted = second_round(first, ("a", "b"), range(3), "a", variants)
    rates = {
        (task, method): {
            r.member.rate for r in wanted if (r.task, r.member.method) == (task, method)
        }
        for task in "ab"
        for method in ("lora", "pissa", "olora")
    }
    assert rates["a", "pissa"] == {step(1e-3, halves) for halves in (-1, 0, 1)}
    assert rates["b", "pissa"] == {step(1e-2, halves) for halves in (-1, 0, 1)}  # by itself
    # Where nothing is known it is LoRA's.
    assert rates["b", "lora"] == rates["b", "olora"] == rates["a", "olora"] == set(RATES)
    assert {r.member.seed for r in wanted} == {0, 1, 2}
    assert not {r.run for r in first} & set(wanted)  # what the first round has is not run again


def test_the_second_round_has_every_control_and_kind_of_start():
    assert {*CONTROLS, DEFAULT, KEEP} < set(SECOND) and len(set(SECOND)) == len(SECOND)
    published = {m for m in FIRST if not m.startswith(("filet", "contrast", "eva-ref", "whitened"))}
    assert published - {v[0] for v in SECOND} == {"lora.frozen"}


def test_what_is_given_is_run_once_and_nothing_else():
    methods, seeds = ["lora", "kasa"], (0, 1)
    wanted = given_round([], "task", methods, (1.0, 2.0), [1e-3, 0.00316], seeds, 32)
    assert {(r.member.method, r.member.scale) for r in wanted} == {
        ("lora", 1.0), ("lora", 2.0), ("kasa", 1.0)
    }  # fmt: skip
    assert {r.member.rate for r in wanted} == {1e-3, 3.162e-3} and len(wanted) == 3 * 2 * 2
    assert {(r.task, r.samples, r.member.ratio) for r in wanted} == {("task", 32, 1.0)}
    records = [record(run, 1 + run.member.rate) for run in wanted[:-1]]  # the least is outermost
    grid = (methods, (1.0, 2.0), [1e-3, 0.00316], seeds, 32)
    assert given_round(records, "task", *grid) == wanted[-1:]
    assert len(given_round(records, "task", *grid[:-1], 320)) == len(wanted)


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


def test_a_rate_at_which_all_runs_diverged_is_never_the_best():
    """It may be the only one that was run with all seeds."""
    at_rates = {1e-3: (1.0, 1.1), 1e-2: (math.nan, math.nan, math.nan)}
    records = [
        record(Run("task", Member("lora", rate, seed=seed)), loss)
        for rate, losses in at_rates.items()
        for seed, loss in enumerate(losses)
    ]
    one = tuned(records, "task")["lora", 1.0, 1.0, 0.0]
    assert (one.rate, one.loss, sorted(one.seeds)) == (1e-3, pytest.approx(1.05), [0, 1])


def test_forms_stand_beside_lora_of_their_own_magnitude():
    method = FORMS[0][0]
    losses = {("lora", 2.0): (3.0, 4.0), (method, 2.0): (2.5, 3.5), (method, 4.0): (1.0, 1.0)}
    records = [
        record(Run("task", Member(name, 1e-3, scale, seed=seed)), loss)
        for (name, scale), of in losses.items()
        for seed, loss in enumerate(of)
    ]
    header, *rows = at_magnitudes(tuned(records, "task"), 2)
    assert header[1:3] == [f"{method}: loss", f"{method}: general"]
    assert [row[0] for row in rows] == ["×2"]  # there is no LoRA ×4
    assert rows[0][1] == "-0.5000 ± 0.0000" and rows[0][3] == "–"
    assert at_magnitudes(tuned(records, "task"), 3) == [header]


def test_what_is_forgotten_is_compared_at_equal_loss():
    """A start at the rate that forgets least of those within 1% of LoRA's loss, if it has one."""
    of = {
        ("lora", 1e-3): (1.0, 5.0),
        (FORMS[1][0], 1e-3): (1.009, 3.0),
        (FORMS[1][0], 1e-2): (0.9, 4.0),
        (FORMS[1][0], 1e-4): (1.1, 2.0),
        ("pissa", 1e-3): (1.02, 1.0),
    }
    records = [
        replace(record(Run("task", Member(name, rate, seed=seed)), loss), general=general)
        for (name, rate), (loss, general) in of.items()
        for seed in (0, 1)
    ]
    header, *rows = at_equal_loss(tuned(records, "task"), 2)
    assert header[4:] == [FORMS[1][0]]
    assert [row[:2] for row in rows] == [[FORMS[1][0], "0.001"], ["lora", "0.001"]]
    assert [row[4] for row in rows] == ["", "-2.0000 ± 0.0000"]
    assert at_equal_loss(tuned(records, "task"), 3) == [header[:4]]


def test_a_population_is_of_one_kind_of_start_and_task():
    methods = ["lora", "pissa", "contrast.d0.01", "contrast.d0.01.untouched", "filet-M.x.zero"]
    assert [subtracts(m) for m in methods] == [False, True, False, True, False]
    of_keep = ["filet-keep.d0.01", "filet-keep.d0.01.frozen", "filet-keep.d0.01.both"]
    assert [subtracts(m) for m in of_keep] == [False, False, True]
    assert not subtracts("lora.frozen")
    runs = [Run(t, Member(m, 1e-3, seed=s)) for s in (1, 0) for t in "ab" for m in methods]
    found = chunks(runs, 5)
    assert [len(chunk) for chunk in found] == [5, 1, 4, 5, 1, 4]
    assert [{r.task for r in chunk} for chunk in found] == 3 * [{"a"}] + 3 * [{"b"}]
    kinds = [{subtracts(r.member.method) for r in chunk} for chunk in found]
    assert kinds == 2 * [{False}, {False}, {True}]
    assert [r.member.seed for r in found[0]] == [0, 0, 0, 1, 1]
    assert sorted(map(repr, runs)) == sorted(repr(r) for chunk in found for r in chunk)
    looked = [Run("a", Member("filet-M.x.zero", 1e-3), samples=n) for n in (80, 160, 80)]
    assert chunks(looked, 5) == [looked[::2], looked[1:2]]


class Trainer:
    """Of tests: what a process has instead of a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def train(self, runs: list[Run]) -> list[Record]:
        if any(run.member.method == "olora" for run in runs):
            raise FloatingPointError("made up")
        return [record(run, 1 + abs(math.log10(run.member.rate / 3.162e-3))) for run in runs]


def test_processes_train_what_a_round_lacks_once_and_until_it_ends():
    records: list[Record] = []

    def lacking():
        return first_round(records, "task", ["lora", "pissa"])

    for done in trained(Trainer, lacking, members=4):
        assert 0 < len(done) <= 4
        records += done
    assert lacking() == [] and len({r.run for r in records}) == len(records) > 10
    begun = len(records)
    for done in trained(Trainer, lambda: [Run("b", Member("lora", 1e-3))], 4, lambda: False):
        records += done
    assert len(records) == begun


def test_the_cheapest_populations_of_the_first_task_are_trained_first(monkeypatch):
    monkeypatch.setattr("effect.workers.devices", lambda: [torch.device("cpu")])
    methods = ["dora", "pissa", "milora", "filet-keep.d0.01", "filet-keep.d0.01.frozen"]
    wanted = [Run(t, Member(m, 1e-3, seed=s)) for t in "ba" for m in methods for s in (0, 1)]
    records: list[Record] = []
    order = []

    def lacking():
        done = {record.run for record in records}
        return [run for run in wanted if run not in done]

    for done in trained(Trainer, lacking, members=4):
        records += done
        order.append((done[0].task, {record.method for record in done}))
    # One start for keep= and for its A frozen, two that subtract, and last what has more than A, B.
    of_a_task = [set(methods[3:]), set(methods[1:3]), {"dora"}]
    assert order == [(task, these) for task in "ba" for these in of_a_task]


def test_a_process_that_fails_ends_the_round():
    wanted = [Run("task", Member("olora", 1e-3))]
    with pytest.raises(RuntimeError, match=r"a process ended while it trained.*olora"):
        list(trained(Trainer, lambda: wanted, 4))


def test_an_order_is_the_seeds_and_has_every_row_once_an_epoch():
    rows = [(torch.full((3 + i % 7,), i), torch.zeros(3 + i % 7)) for i in range(32)]

    def numbers(seed):
        return [[int(row[0][0]) for row in batch] for batch in order(rows, seed, 4, 8)]

    assert sorted(i for batch in numbers(3) for i in batch) == list(range(32))
    assert numbers(3) == numbers(3) != numbers(4)
    with pytest.raises(ValueError, match="expected at least a batch"):
        order(rows[:3], 0, 4, 1)


def test_rounds_and_tables_look_at_one_rank_and_number_of_samples():
    # Those of another rank, and of other samples, are far better, at another rate.
    others = [
        record(Run("task", Member(method, rate), rank, samples), rate)
        for rank, samples in ((8, 320), (32, 80))
        for method in ("lora", "pissa")
        for rate in RATES
    ]
    assert best(others) == {} and tuned(others, "task") == {}
    assert first_round(others, "task") == first_round([], "task")
    records = played(lambda r: first_round(r, "task", ["lora", "pissa"]), begun=others)
    variant = ("pissa", 1.0, 1.0, 0.0)
    assert best(records)["task", variant] == (3.162e-3, 1.0)
    pissa = [v for v in best(records) if v[1][0] == "pissa"]
    assert second_round(records, ["task"], range(1), "task", [v for _, v in pissa]) == []
    assert tuned(records, "task")[variant].rate == 3.162e-3
    for key, of in (("rank", 8), ("samples", 80)):
        found = tuned(records, "task", **{key: of})
        assert found.keys() == {variant, ("lora", 1.0, 1.0, 0.0)} and found[variant].rate == 1e-3
        assert [getattr(r, key) for r in found[variant].seeds.values()] == [of]


def test_a_task_without_lora_has_nothing_to_compare_with():
    found = tuned([record(Run("task", Member("pissa", 1e-3)), 1.0)], "task")
    assert compared(found) == []


def test_a_text_has_labels_everywhere_and_a_prompt_has_none(tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", {"text": "abc"})
    answers = write_jsonl(tmp_path / "answers.jsonl", {"prompt": "ab ", "completion": "c"})
    task = causal_task("task", texts, answers, Letters(), general=texts)
    for (ids, labels), labelled in ((task.train[0], 5), (task.test[0], 2), (task.general[0], 5)):
        expected = torch.where(torch.arange(len(ids)) < len(ids) - labelled, -100, ids)
        assert torch.equal(labels, expected) and len(ids) == (5 if labelled == 5 else 6)


def test_tables_of_another_number_of_samples_are_not_empty(tmp_path, capsys):
    runs = [Run("task", Member("lora", 1e-3, seed=s), samples=32) for s in (0, 1)]
    append(tmp_path / "a.csv", [record(run, 1.5 + run.member.seed) for run in runs])
    main([str(tmp_path), "--seeds", "2", "--samples", "32"])
    printed = capsys.readouterr().out
    assert (
        "| lora | 0.001 (edge) | 2.0000 |" in printed
        and "| lora | 0.001 (edge) | 1.5000 |" in printed
    )
