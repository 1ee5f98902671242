"""The numbers of the tables and pictures, from records that nobody ran, against formulas."""

from __future__ import annotations

import math
import random
import struct

import pytest
from made_up import record
from scipy.stats import rankdata, ttest_rel

from effect import figures
from effect.lines import read_lines, write_lines
from effect.overlap import Overlap
from effect.records import ALL, Run, append
from effect.summaries import (
    SCALINGS,
    Cell,
    Correlation,
    Difference,
    GroupLine,
    Point,
    correlations,
    group_lines,
    points,
    table4,
    verdict,
)
from effect.sweeps import BY_RANK, BY_SAMPLES, RANKS, SAMPLE_COUNTS, group_runs, table4_method
from effect.tables import label
from effect.train import Member

RATES = (1e-3, 3.162e-3, 1e-2)
ORDER = {"M": 0.0, "R": 0.1, "P": 0.2}


def nine(seeds=3, task="a", order=ORDER, noise=0.01, cells="MRP"):
    """Records of Table 4: the best rate of each scaling is another."""
    draw = random.Random(task)
    return [
        record(
            Run(task, Member(table4_method(selection, scaling), rate, seed=seed)),
            order[selection] + 0.3 * (rate != best) + draw.gauss(0, noise),
            general=draw.random(),
        )
        for selection in cells
        for scaling, best in zip(SCALINGS, RATES, strict=True)
        for rate in RATES
        for seed in range(seeds)
    ]


def test_table4_is_at_the_best_rate_with_paired_differences():
    records = nine() + nine(task="b", order={"M": 3.0, "R": 2.0, "P": 1.0})
    cells, differences = table4(records, "a")
    assert len(cells) == 9 and {c.task for c in cells} == {"a"}
    assert {(c.scaling, c.rate) for c in cells} == set(zip(SCALINGS, RATES, strict=True))
    assert {(c.rate, c.inside) for c in cells} == {(1e-3, 0), (3.162e-3, 1), (1e-2, 0)}
    assert len(differences) == 3 * 2 * 3

    def values(selection, scaling, rate, key):
        method = table4_method(selection, scaling)
        of = [r for r in records if (r.task, r.method, r.rate) == ("a", method, rate)]
        return [getattr(r, key) for r in sorted(of, key=lambda r: r.seed)]

    for scaling, rate in zip(SCALINGS, RATES, strict=True):
        for first, second in ("MR", "RP"):
            for key in ("loss", "general"):
                one, other = (values(s, scaling, rate, key) for s in (first, second))
                truth = ttest_rel(one, other).confidence_interval(0.95)
                pair = f"{first} − {second}"
                (its,) = [
                    d for d in differences if (d.scaling, d.pair, d.measure) == (scaling, pair, key)
                ]
                assert its.pairs == 3
                assert its.mean - its.half == pytest.approx(truth.low)
                assert its.mean + its.half == pytest.approx(truth.high)
    found = {(c.selection, c.scaling): c.loss for c in cells}
    for (selection, scaling), loss in found.items():
        rate = dict(zip(SCALINGS, RATES, strict=True))[scaling]
        assert loss == pytest.approx(sum(values(selection, scaling, rate, "loss")) / 3)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, "confirmed: all 6"),
        ({"order": {"M": 0.0, "R": 0.2, "P": 0.1}}, "refuted: against the paper's order in R − P"),
        ({"order": {"M": 0.0, "R": 0.0, "P": 0.1}, "noise": 0.02}, "undecided: 0 is within M − R"),
        ({"seeds": 1}, "one seed: in the paper's order"),
        ({"seeds": 1, "order": {"M": 0.3, "R": 0.1, "P": 0.2}}, "one seed: against"),
        ({"cells": "MR"}, "incomplete: 3 of 6"),
    ],
)
def test_a_verdict_is_of_all_intervals(settings, word):
    assert verdict(table4(nine(**settings), "a")[1]).startswith(word)


def grouped(task, key, scale, loss, seeds=(0,)):
    return [
        record(run, loss(int(run.member.method[-2:]), run.member.seed))
        for run in group_runs(task, key, scale, seeds)
    ]


def test_correlations_are_spearmans_of_the_key():
    draw = random.Random(0)
    noise = [draw.gauss(0, 12) for _ in range(32)]
    records = [
        *grouped("a", "sigma", "min", lambda n, _: n + noise[n]),
        *grouped("a", "sigma", "max", lambda n, _: -n),
        *grouped("a", "energy", "min", lambda n, seed: n + (-1) ** seed * noise[n], (0, 1)),
        # The largest key has diverged: the worst, wherever the others are.
        *grouped("a", "energy", "max", lambda n, _: math.nan if n == 0 else -n),
        *grouped("b", "sigma", "min", lambda n, _: -n),
        record(Run("a", Member("lora", 1e-3)), 1.0),
    ]
    lines = group_lines(records, "a")
    assert len(lines) == 4 * 32 and {line.task for line in lines} == {"a"}
    of = [line for line in lines if (line.key, line.scale) == ("energy", "min")]
    assert [(x.number, x.seeds) for x in of] == [(n, 2) for n in range(32)]
    assert [x.loss for x in of] == pytest.approx(range(32))  # the noise is not in the mean
    found = {(c.key, c.scale): c for c in correlations(lines)}
    keys = rankdata([-n for n in range(32)])
    losses = rankdata([n + noise[n] for n in range(32)])
    squares = sum((keys - losses) ** 2)
    assert found["sigma", "min"].rho == pytest.approx(1 - 6 * squares / (32 * (32**2 - 1)))
    assert -0.95 < found["sigma", "min"].rho < -0.3
    assert found["sigma", "max"].rho == pytest.approx(1)  # a large key, a large loss
    assert found["energy", "min"].rho == pytest.approx(-1)
    assert found["energy", "max"].rho == pytest.approx(1)
    assert all(c.groups == 32 for c in found.values())


def member(variant, seed=0):
    method, scale, ratio, decay = variant
    return Member(method, 1e-3, scale, ratio, decay, seed)


def swept(task="a", seeds=2):
    """Losses that tell the variant, the rank and the samples."""
    ranks = [
        record(Run(task, member(v, seed), rank), i + 10 / rank + seed * (i + 1) / 100)
        for i, v in enumerate(BY_RANK)
        for rank in RANKS
        for seed in range(seeds)
    ]
    samples = [
        record(Run(task, member(v, seed), 32, count), -i - count + seed / 100)
        for i, v in enumerate(BY_SAMPLES)
        for count in SAMPLE_COUNTS
        if count != 320
        for seed in range(seeds)
    ]
    return ranks + samples


def test_points_are_less_lora_at_the_same_rank():
    found = points(swept(), "a", BY_RANK, ranks=RANKS)
    assert len(found) == len(RANKS) * len(BY_RANK)
    for point in found:
        i = list(map(label, BY_RANK)).index(point.start)
        assert point.loss == pytest.approx(i + 10 / point.rank + (i + 1) / 200)
        one, lora = [i, i + (i + 1) / 100], [0, 0.01]
        truth = ttest_rel(one, lora).confidence_interval(0.95) if i else None
        assert point.difference == pytest.approx(i * 1.005) and point.pairs == 2
        if truth:
            assert point.difference - point.half == pytest.approx(truth.low)
        assert point.samples == 320


def test_points_by_samples_are_less_lora_of_the_first_round():
    found = points(swept(), "a", BY_SAMPLES, samples=SAMPLE_COUNTS)
    assert {(p.start, p.samples) for p in found} == {
        (label(v), count) for v in BY_SAMPLES for count in SAMPLE_COUNTS
    }
    (every,) = [p for p in found if p.samples == ALL and p.start == label(BY_SAMPLES[0])]
    assert every.loss == pytest.approx(0.005)
    assert every.difference == pytest.approx(0.005 - (10 / 32 + 0.005))
    assert points([r for r in swept() if r.method != "lora"], "a", BY_SAMPLES)[0].pairs == 0


def shape(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000
    return struct.unpack(">II", data[16:24])


def test_a_folder_of_records_becomes_csv_files_and_pictures(tmp_path, capsys):
    records = nine() + nine(task="b", seeds=1)
    for key in ("sigma", "energy"):
        for scale in ("min", "max"):
            records += grouped("a", key, scale, lambda n, _: math.nan if n == 3 else -n)
    append(tmp_path / "records.csv", records + swept())
    overlaps = [
        Overlap("eva-ref", *pair, f"model.layers.{i}.mlp.up_proj", 2, 8, 0.5, 0.25)
        for pair in (("a", "a"), ("a", "b"), ("b", "b"))
        for i in range(2)
    ]
    folder = tmp_path / "figures"
    write_lines(folder / "overlap.csv", Overlap, overlaps)
    figures.main([str(tmp_path)])
    kinds = {
        "table4": Cell,
        "table4-differences": Difference,
        "groups": GroupLine,
        "groups-correlations": Correlation,
        "ranks": Point,
        "samples": Point,
        "overlap": Overlap,
    }
    counts = {name: len(read_lines(folder / f"{name}.csv", kind)) for name, kind in kinds.items()}
    assert counts == {
        "table4": 18,
        "table4-differences": 36,
        "groups": 128,
        "groups-correlations": 4,
        "ranks": 30,
        "samples": 10,
        "overlap": 6,
    }
    assert read_lines(folder / "overlap.csv", Overlap) == overlaps
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {
        *("table4.png", "groups-a.png", "ranks-a.png", "samples-a.png", "overlap.png")
    }
    assert all(min(shape(folder / name)) > 300 for name in pictures)
    text = capsys.readouterr().out
    assert "## Table 4, a" in text and "confirmed: all 6" in text and "one seed: in" in text
    assert "| a | sigma | min | 32 | +" in text


def test_a_folder_without_the_new_rounds_has_only_what_it_can_have(tmp_path):
    append(tmp_path / "records.csv", [record(Run("a", Member("lora", 1e-3)), 1.0)])
    figures.main([str(tmp_path)])
    assert not (tmp_path / "figures").exists()


def test_lines_of_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("task,other\na,b\n")
    with pytest.raises(ValueError, match=r"columns \['task', 'other'\]; expected"):
        read_lines(tmp_path / "a.csv", Overlap)
