"""What a step of a population takes beside a step of PEFT."""

from __future__ import annotations

import time

import pytest
import torch
from language import write_folders

from effect import throughput
from effect.bench import Bench
from effect.throughput import alone, main, seconds_a_step
from effect.train import Recipe


def test_what_is_done_once_is_not_in_a_step(monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def train(each):
        def run(steps):
            asked.append(steps)
            clock[0] += 7 + each * steps

        return run

    assert seconds_a_step([train(0.5), train(2.0)], 3, 8, 2) == pytest.approx([0.5, 2.0])
    assert asked == [8, 8, *(2 * [8, 3, 8, 3])]


def test_steps_of_peft_train(tmp_path, monkeypatch):
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    write_folders(model, data)
    bench = Bench(model, data, torch.device("cpu"), Recipe(batch_size=4), 3)
    losses = []
    forward = type(bench.kind.model).forward

    def heard(self, **batch):
        output = forward(self, **batch)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(type(bench.kind.model), "forward", heard)
    train = alone(bench, "task", rank=4)
    train(60)
    first = sum(losses[:5]) / 5
    assert len(losses) == 60 and sum(losses[-5:]) / 5 < first - 0.01


def test_what_is_said(tmp_path, capsys, monkeypatch):
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    write_folders(model, data)

    def timed(trains, few, many, rounds):
        assert (few, many, rounds) == (10, 60, 3)
        for train in trains:
            train(2)
        return [0.178, 0.226]

    monkeypatch.setattr(throughput, "seconds_a_step", timed)
    main(["--model", str(model), "--data", str(data), "--task", "task", "--batch-size", "4"])
    said = capsys.readouterr().out
    assert "a step of 16 together 178 ms, of PEFT alone 226 ms: 20.3 times" in said


def test_steps_that_cannot_be_told_apart_are_refused(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--model", "m", "--data", "d", "--steps", "4", "4"])
    assert "--steps 4 4: expected 0 < FEW < MANY" in capsys.readouterr().err
