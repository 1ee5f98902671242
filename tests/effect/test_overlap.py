"""How far subspaces are the same."""

from __future__ import annotations

import math

import pytest
import torch
from contexts import batches, context, task

from effect.context import Context
from effect.overlap import again, compare, full_basis, measure
from effect.tasks import CausalTask
from filet.report.compare import basis, mean_squared_cosine


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_basis_is_of_the_rows_whatever_their_lengths():
    A = draw(5, 12)
    lengths = torch.logspace(-8, 0, 5, dtype=torch.float64).unsqueeze(1)
    Q = full_basis(A * lengths)
    torch.testing.assert_close(Q.T @ Q, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(Q @ Q.T, torch.linalg.pinv(A) @ A)  # the projection on the rows
    with pytest.raises(ValueError, match="5 rows span 4 dimensions"):
        full_basis(torch.cat([A[:4], 2 * A[:1]]))


def test_overlaps_are_of_principal_angles():
    angles = torch.tensor([0.0, 0.3, math.pi / 2], dtype=torch.float64)
    frame = torch.linalg.qr(draw(9, 6))[0]
    one, away = frame[:, :3], frame[:, 3:]
    turn = torch.linalg.qr(draw(3, 3, seed=1))[0]
    other = (one * angles.cos() + away * angles.sin()) @ turn
    assert mean_squared_cosine(one, other) == pytest.approx(float(angles.cos().square().mean()))
    assert mean_squared_cosine(one, one @ turn) == pytest.approx(1)
    assert mean_squared_cosine(one, away) == pytest.approx(0, abs=1e-12)


def test_random_subspaces_overlap_by_r_over_n():
    bases = [basis(draw(4, 20, seed=seed)) for seed in range(200)]
    mean = sum(map(mean_squared_cosine, bases[::2], bases[1::2])) / 100
    assert mean == pytest.approx(4 / 20, abs=0.02)


def test_pairs_are_of_different_tasks_and_of_two_samples_of_each():
    bases = {
        name: {"layer": basis(draw(3, 8, seed=i))}
        for i, name in enumerate(["a", "b", again("a"), again("b")])
    }
    found = compare("method", bases, ["a", "b"])
    assert [(x.task, x.other) for x in found] == [("a", "a"), ("a", "b"), ("b", "b")]
    for line, (one, other) in zip(found, [("a", again("a")), "ab", ("b", again("b"))], strict=True):
        truth = torch.linalg.svdvals(bases[one]["layer"].T @ bases[other]["layer"])
        assert line.overlap == pytest.approx(float(truth.square().mean()), abs=5.1e-5)
        assert (line.rank, line.width, line.random) == (3, 8, 3 / 8)


class Bench:
    """A small model whose tasks are halves of its samples."""

    def __init__(self):
        self.its = task("llama")
        rows = list(range(len(self.its.samples)))
        self.tasks = {name: CausalTask(name, rows, rows, keep=rows) for name in "ab"}
        self.contexts, self.seen = {}, {}

    def task(self, name):
        return self.tasks[name]

    def context(self, run):
        of = self.tasks[run.task]
        assert of.name == run.task and len(of.keep) == run.samples
        self.seen[run.task] = of.train
        samples = [self.its.samples[i] for i in of.train]
        load = context("llama").load
        its = Context(load, self.its.targets, run.rank, 0, batches(samples))
        self.contexts[run] = its
        return its


def test_samples_of_a_task_share_no_row_and_draws_differ():
    bench = Bench()
    methods = ["pissa", "lora", "filet-M.fisher.relative.zero"]
    found = measure(bench, ["a", "b"], methods, rank=3, samples=4)
    assert bench.contexts == {}
    for name in "ab":
        both = [*bench.seen[name], *bench.seen[again(name)]]
        assert sorted(both) == sorted(set(both)) == list(range(len(bench.its.samples)))
    assert len(found) == 3 * 3 * len(bench.its.targets)
    by = {method: [x for x in found if x.method == method] for method in methods}
    assert all(x.overlap == pytest.approx(1, abs=1e-5) for x in by["pissa"])  # of the weights alone
    assert all(x.overlap < 0.9 for x in by["lora"])  # each has a seed of its own
    # The same rows in both tasks, other rows in the other sample.
    same = [x for x in by["filet-M.fisher.relative.zero"] if x.task != x.other]
    assert all(x.overlap == pytest.approx(1, abs=1e-5) for x in same)
    others = [x.overlap for x in by["filet-M.fisher.relative.zero"] if x.task == x.other]
    assert min(others) < 0.99
