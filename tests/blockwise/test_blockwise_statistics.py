"""Statistics that the blockwise engine saves are those of the other, data to keep included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    LAYERS,
    MARKS,
    Crash,
    Failing,
    assert_equal,
    assert_same_adapter,
    batches,
    in_step,
    initialize,
    kept,
    lora,
    model_folder,
    run_of,
)
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import filet
from filet import FiletConfig, FiletReport, Statistics
from filet_kernels import SecondMoment

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*keep PEFT's default", "ignore:fan_in_fan_out"),
]


def saved(engine: str, folder: Path, place: Path, **more: Any) -> Statistics:
    path = place / f"{engine}.safetensors"
    initialize(folder, place / engine, engine, save_statistics=path, **more)
    return Statistics.load(path)


def whole(moment: SecondMoment) -> Tensor:
    lower = moment.sum.double().tril()
    return lower + lower.tril(-1).T


def assert_same(one: Statistics, other: Statistics) -> None:
    """Moments to 1e-6 of their norm, everything else but times the same."""
    for field in dataclasses.fields(Statistics):
        if field.name not in ("moments", "keep", "seconds", "peak_memory", "path"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert one.seconds > 0 and one.peak_memory > 0
    assert list(one.moments) == list(other.moments)
    assert (one.keep is None) == (other.keep is None)
    for name, moments in one.moments.items():
        theirs = other.moments[name]
        assert moments.shape == theirs.shape
        assert int(moments.loss_terms) == int(theirs.loss_terms)
        pairs = [(moments.input, theirs.input), (moments.output, theirs.output)]
        if one.keep is not None and other.keep is not None:
            pairs.append((one.keep[name], other.keep[name]))
        for a, b in pairs:
            assert a.space == b.space and int(a.count) == int(b.count), name
            assert float((whole(a) - whole(b)).norm()) <= 1e-6 * float(whole(b).norm()), name


@pytest.mark.parametrize("keep", [None, kept()], ids=["task", "keep"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_they_are_those_of_the_other_engine(kind: str, keep: Any, tmp_path: Path) -> None:
    """Also of modules that share an input."""
    folder = model_folder(kind)
    one, other = (saved(e, folder, tmp_path, keep=keep) for e in ("blockwise", "memory"))
    assert_same(one, other)
    for follower, leader in one.shared_input.items():
        assert one.moments[follower].input is one.moments[leader].input
        assert one.keep is None or one.keep[follower] is one.keep[leader]
    assert bool(one.shared_input) == (kind == "llama")
    assert (one.keep is not None) == (keep is not None)
    assert not (tmp_path / "blockwise.filet-run").exists()


def test_a_module_that_the_task_does_not_reach_has_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of the data to keep, which does: its space and its sharing would be guesses."""
    sizes = {len(batch["input_ids"]) for batch in kept()}
    assert not sizes & {len(batch["input_ids"]) for batch in batches()}

    def forward(mlp: Any, x: Tensor) -> Tensor:
        gated = mlp.gate_proj(x) if len(x) in sizes else 1
        return mlp.down_proj(gated * mlp.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    one, other = (saved(e, folder, tmp_path, keep=kept()) for e in ("blockwise", "memory"))
    assert_same(one, other)
    reports = [FiletReport.load(tmp_path / engine) for engine in ("blockwise", "memory")]
    assert_equal(*reports, 1e-5)
    assert one.keep is not None
    unseen = [name for name, why in reports[0].left_default.items() if why == "it saw no token"]
    assert len(unseen) == LAYERS and all("gate_proj" in name for name in unseen)
    assert not any(int(one.keep[name].count) for name in unseen)


def test_applied_they_give_the_adapter_of_the_run_and_any_other(
    folder: Path, tmp_path: Path
) -> None:
    """Contrast at another rank, and energies, from the same file."""
    statistics = saved("blockwise", folder, tmp_path, keep=kept())
    for config, rank, keep in (
        (FiletConfig(), 4, kept()),
        (FiletConfig(), 6, kept()),
        (FiletConfig(select="min"), 4, None),
    ):
        place = tmp_path / f"{config.select}-{rank}"
        chosen = lora(r=rank)
        report = initialize(folder, place, "memory", keep=keep, lora_config=chosen, config=config)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora(r=rank))
        assert_equal(filet.apply_statistics(model, statistics, config), report, 1e-5)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "auto-4")
    # And added to those of other data, taken by the other engine.
    (tmp_path / "more").mkdir()
    merged = statistics.merge(saved("memory", folder, tmp_path / "more", keep=kept(3)))
    assert merged.keep_samples == 2 * statistics.keep_samples and merged.samples > 0


def test_a_killed_run_has_all_of_them(folder: Path, tmp_path: Path) -> None:
    """Blocks finished before are in the file; a run that began without them cannot go on with."""
    path = tmp_path / "killed.safetensors"
    more: Any = {"keep": kept(), "save_statistics": path}
    failing = in_step(disk=Failing(Crash(), after=3))
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=failing, **more)
    run = tmp_path / "out.filet-run"
    there = {file.name: file.stat().st_mtime_ns for file in run.glob("statistics-*")}
    assert len(there) >= 2 and not path.exists()
    with pytest.raises(ValueError, match="statistics is True there and None now"):
        initialize(folder, tmp_path / "out", keep=kept())
    finished = {f"statistics-{block}.safetensors" for block in range(LAYERS - 2, LAYERS)}
    with run_of(folder, tmp_path, run_folder=run, **more) as again:
        assert again.journal.top < LAYERS - 1
        again.sweep()
        now = {file.name: file.stat().st_mtime_ns for file in run.glob("statistics-*")}
        assert len(now) == LAYERS and {n: now[n] for n in finished} == {
            n: there[n] for n in finished
        }
        again.write(tmp_path / "out")
    assert_same(Statistics.load(path), saved("memory", folder, tmp_path, keep=kept()))


def test_the_disk_that_they_need_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """At most as if no module shared its input."""
    reserved = []
    for name, more in (("without", {}), ("with", {"save_statistics": tmp_path / "s.safetensors"})):
        (tmp_path / name).mkdir()
        with run_of(folder, tmp_path / name, keep=kept(), **more) as run:
            run.sweep()
            reserved.append(run.journal.reserved)
            sums = [
                tensor.nbytes
                for file in run.journal.folder.glob("statistics-*")
                for moments in [Statistics.load(file)]
                for tensor in {
                    id(m): m.sum
                    for name, its in moments.moments.items()
                    for m in (its.input, its.output, moments.keep[name])  # type: ignore[index]
                }.values()
            ]
            shapes = [target.shape for target in run.model.targets.values()]
    added = reserved[1] - reserved[0]
    assert added == sum(3 * 4 * min(shape) ** 2 for shape in shapes) >= sum(sums) > 0.5 * added


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_files_that_would_be_destroyed(engine: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "there.safetensors"
    path.write_text("precious")
    for wrong, message in (
        (path, "exists; expected overwrite=True"),
        (tmp_path, "expected a file beside it"),
        (tmp_path / "out" / "s.safetensors", "expected a file beside it"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(folder, tmp_path / "out", engine, save_statistics=wrong)
    weights = next(folder.glob("*.safetensors"))
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="is a file of the model"):
        initialize(folder, tmp_path / "out", engine, save_statistics=weights, overwrite=True)
    for place in ({"save_statistics": path / "s"}, {"output": path / "out"}):
        wrong = {"output": tmp_path / "out", **place}
        with pytest.raises(NotADirectoryError, match=r"there\.safetensors"):
            initialize(folder, wrong.pop("output"), engine, **wrong)
    assert weights.read_bytes() == before
    assert path.read_text() == "precious" and not (tmp_path / "out").exists()
    initialize(folder, tmp_path / "out", engine, save_statistics=path, overwrite=True)
    assert Statistics.load(path).samples == len(torch.cat([b["labels"][:, 0] for b in batches()]))
