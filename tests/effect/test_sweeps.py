"""What the rounds of the paper's Table 4 and Figures 1, 3 and 5 lack."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from contexts import context
from made_up import played, record, valley

from effect.bench import Bench
from effect.groups import singular_groups
from effect.inits import START
from effect.plan import first_round
from effect.population import Lora, Population
from effect.records import ALL, OWN, Run
from effect.runs import evaluate, train_population
from effect.sweeps import BY_RANK, BY_SAMPLES, RANKS, SAMPLE_COUNTS, SWEEPS, family
from effect.tasks import CausalTask
from effect.train import Member, Recipe
from effect.workers import chunks, subtracts

METHODS = ["lora", "pissa", *(variant[0] for variant in BY_SAMPLES)]
LEAST = {"pissa": 1e-3}


def loss(run: Run) -> float:
    return valley(run, LEAST.get(run.member.method, 3.162e-3))


@pytest.fixture(scope="module")
def first():
    return played(lambda r: first_round(r, "gsm8k", METHODS), loss)


def lacks(name, records, tasks=("gsm8k",), seeds=range(2), thorough=False):
    return SWEEPS[name](records, list(tasks), seeds, thorough)


def test_table4_has_nine_cells_whose_best_rate_is_inside():
    records = played(lambda r: lacks("table4", r, ("a", "b")), lambda run: valley(run, 3.162e-2))
    cells = Counter((r.task, r.method) for r in records)
    assert {method for _, method in cells} == {
        f"filet-{s}.{c}.relative.untouched"
        for s in "MRP"
        for c in ("fisher", "singular", "constant")
    }
    assert set(cells.values()) == {5 * 2} and {task for task, _ in cells} == {"a", "b"}
    rates = {r.rate for r in records}
    assert rates == {1e-3, 3.162e-3, 1e-2, 3.162e-2, 0.1}
    assert {(r.scale, r.rank, r.samples) for r in records} == {(1.0, 32, 320)}


def test_table4_begins_at_the_best_rate_of_the_first_round():
    method = "filet-R.constant.relative.untouched"
    done = [record(run, valley(run, 0.1)) for run in (Run("gsm8k", Member(method, 0.1)),)]
    wanted = [r.member.rate for r in lacks("table4", done, ("boolq",)) if r.member.method == method]
    assert sorted(set(wanted)) == [3.162e-2, 0.1, 0.3162]


def test_groups_are_trained_one_by_one_in_populations_of_their_own():
    wanted = lacks("groups", [])
    methods = [run.member.method for run in wanted]
    assert len(set(methods)) == len(methods) == 2 * 2 * 32 and set(methods) <= START.keys()
    assert all(run.rank == OWN and run.member.seed == 0 for run in wanted)
    assert all(subtracts(method) for method in methods)
    families = {}
    for run in wanted:
        families.setdefault(family(run.member.method), []).append(run)
    assert len(families) == 4
    for of in families.values():
        assert len(of) == 32
        assert len({run.member.rate for run in of}) == 1
        # Two populations of 16.
        assert chunks(of, 16) == [of[:16], of[16:]]
    assert len(lacks("groups", [], thorough=True)) == 2 * len(wanted)
    assert lacks("groups", [record(run, 1.0) for run in wanted]) == []
    assert family("filet-M.fisher.relative.zero") == "filet-M.fisher.relative.zero"


@pytest.mark.parametrize("name", ["ranks", "samples"])
def test_ranks_and_samples_are_at_the_rate_of_the_first_round(first, name):
    variants = BY_RANK if name == "ranks" else BY_SAMPLES
    counts = RANKS if name == "ranks" else SAMPLE_COUNTS
    wanted = lacks(name, first)
    assert len(set(wanted)) == len(wanted)
    ran = [*wanted, *(r.run for r in first)]
    for method, scale, *_ in variants:
        for count in counts:
            rank, samples = (count, 320) if name == "ranks" else (32, count)
            of = [
                r
                for r in ran
                if (r.member.method, r.member.scale, r.rank, r.samples)
                == (method, scale, rank, samples)
            ]
            rate = LEAST.get(method, 3.162e-3)
            assert {r.member.seed for r in of if r.member.rate == rate} == {0, 1}
            if (rank, samples) != (32, 320):
                assert {r.member.rate for r in of} == {rate}
    thorough = {r.member.rate for r in lacks(name, first, thorough=True)}
    assert {1e-3, 3.162e-3, 1e-2} <= thorough
    done = [*first, *(record(run, loss(run)) for run in wanted)]
    assert lacks(name, done) == []


def test_a_rate_that_nobody_looked_for_is_asked_for(first):
    with pytest.raises(ValueError, match=r"no run of lora ×1 .* on boolq or gsm8k"):
        lacks("ranks", [], ("boolq",))
    # The other task's rate where the first round was not on this one.
    assert {r.task for r in lacks("ranks", first, ("boolq",))} == {"boolq"}


def tokens(count):
    ids = [torch.arange(1, 6 + i % 5) for i in range(count)]
    return [(x, x.clone()) for x in ids]


def by_row(task, rows):
    return {"input_ids": [ids for ids, _ in rows]}


@pytest.mark.parametrize(("samples", "found"), [(7, 7), (ALL, 37)])
def test_one_context_of_a_task_and_samples_serves_every_rank(samples, found):
    bench = Bench.__new__(Bench)  # no model: nothing asks for one here
    bench.contexts = {}
    bench.kind = SimpleNamespace(load=lambda task: None, targets=["q_proj"], batch=by_row)
    bench.tasks = {"a": CausalTask("a", tokens(37), [], keep=tokens(3))}
    its = bench.context(Run("a", Member("lora", 1e-3), 8, samples))
    assert its.rank == 8 and sum(len(b["input_ids"]) for b in its.batches) == found
    assert bench.context(Run("a", Member("lora", 1e-3), 64, samples)) is its and its.rank == 64


def test_a_population_of_groups_begins_at_the_base_and_trains():
    its = context("llama")
    groups = [group.starts for group in singular_groups(its, "sigma", "max", 4)]
    assert len({start.A.shape[0] for start in groups[0].values()}) > 1  # a layer's rank is its own
    base, rows = its.load(), tokens(16)
    population = Population(its.load(), groups, Lora)
    data = CausalTask("a", rows, rows)
    loss, _ = evaluate(population, data, rows, 4)
    ids, labels = data.batch(rows, torch.device("cpu"))
    expected = base(**ids, labels=labels).loss.item()
    assert loss == pytest.approx(4 * [expected], rel=1e-4)
    members = [Member(f"groups.sigma.max.{i:02}", 1e-2) for i in range(4)]
    results = train_population(population, data, members, Recipe(20, 4, 2))
    assert all(result.loss < 0.9 * expected for result in results)
    assert len({result.loss for result in results}) == 4
