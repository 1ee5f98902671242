"""What the rounds of the paper's Table 4 and Figures 1, 3 and 5 lack."""

from __future__ import annotations

from collections import Counter

import pytest
from made_up import played, record, valley

from effect.inits import START
from effect.plan import first_round
from effect.records import OWN, Run
from effect.run import belongs, chunk, subtracts
from effect.sweeps import BY_RANK, BY_SAMPLES, RANKS, SAMPLE_COUNTS, SWEEPS, family
from effect.train import Member

METHODS = ["lora", "pissa", "filet-M.fisher.relative.zero", "contrast.d0.01"]
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
        assert len(of) == 32 and len({belongs(run) for run in of}) == 1
        assert len({run.member.rate for run in of}) == 1
        # Two populations of 16.
        assert chunk(of, 16) == of[:16] and chunk(of[16:], 16) == of[16:]
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
