"""The command line where memory or disk runs out, is interrupted, or would destroy something."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of
from safetensors.torch import load_file

import filet
from disk import files_up_to
from filet.adapter import saved
from filet.cli.main import main
from filet.report.report import FiletReport


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plan_of(text: str) -> dict[str, str]:
    """The plan's lines: a name and what is said of it."""
    lines = text[: text.index("padding")].splitlines()
    return {name: " ".join(words) for name, *words in map(str.split, lines)}


def test_the_plan_is_printed_and_the_batches_follow_it(
    init: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*init, "--batch-size", "auto"]) == 0
    lines = plan_of(capsys.readouterr().out)
    assert lines["batches"] == "of 24 samples x 13 tokens"  # all there are
    assert lines["data"] == f"24 samples, {sum(5 + n % 9 for n in range(24))} tokens"
    assert lines["passes"] == "1" and lines["time"].startswith("about")
    assert lines["moments"] == "19 KiB"  # two blocks with nine of 16 x 16 and two of 8 x 8
    assert main([*init, "--batch-size", "2", "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert plan_of(out)["batches"] == "of 2 samples x 13 tokens"
    assert "of 10 batches" in out


def test_passes_and_checkpointing_give_the_same_adapter(
    init: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    calls = []
    forward = LlamaAttention.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", count)
    output = tmp_path / "out" / "adapter"
    assert main(init) == 0
    plain, once = adapter_weights(output), len(calls)
    probe = 2 * 2  # two runs of two blocks
    for option in ("--passes=2", "--gradient-checkpointing"):
        calls.clear()
        assert main([*init, option, "--overwrite"]) == 0
        found = adapter_weights(output)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
        twice = 2 * once - (probe if option == "--passes=2" else 0)
        assert len(calls) == twice, option


def out_of_memory_above(samples: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that has no memory for batches above that; returns the sizes it was run with."""
    from transformers import LlamaForCausalLM

    sizes: list[int] = []
    forward = LlamaForCausalLM.forward

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    return sizes


@pytest.mark.parametrize("command", ["init", "init and keep", "stats"])
def test_smaller_batches_where_memory_runs_out(
    command: str,
    init: list[str],
    stats: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / ("s.safetensors" if command == "stats" else "out/adapter")
    if command == "stats":
        argv = [*stats, "--data", str(data), "--output", str(output)]
    elif command == "init":
        argv = init
    else:
        argv = [*init, "--save-statistics", str(tmp_path / "kept.safetensors")]
    weights = output if command == "stats" else output / "adapter_model.safetensors"
    assert main([*argv, "--batch-size", "3"]) == 0
    expected = load_file(weights)
    sizes = out_of_memory_above(7, monkeypatch)
    capsys.readouterr()
    assert main([*argv, "--batch-size", "auto", "--overwrite"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    # 24 samples as planned, then 12, 6 (where short samples are more), 3.
    assert [line.rpartition("--batch-size ")[2] for line in warned] == ["12", "6", "3"]
    assert all("in the forward of batch" in line and "2.00 GiB" in line for line in warned)
    assert sizes[:4] == [1, 2, 24, 12] and max(sizes[4:]) > 7 and max(sizes[-4:]) <= 7
    found = load_file(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_memory_for_one_sample_or_for_what_was_asked(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes = out_of_memory_above(3, monkeypatch)
    message = error_of(capsys, [*init, "--batch-size", "4"])  # as asked for, so no other is tried
    assert "out of memory in the forward of batch 0 (counted from 0, 4 samples × 13 tok" in message
    assert "--max-length" in message and "--gradient-checkpointing" in message
    assert sizes == [1, 2, 4]
    out_of_memory_above(0, monkeypatch)
    message = error_of(capsys, [*init, "--batch-size", "auto"])
    assert "(counted from 0, 1 sample × 13 tokens): 2.00 GiB asked for" in message
    assert not (tmp_path / "out").exists()


def test_batches_are_halved_down_to_one(
    init: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def full(peft_model: Any, loader: Any, **_: Any) -> None:
        sizes.append(loader[0]["input_ids"].shape[0])
        raise filet.OutOfMemoryError("out of memory", "pass", None)

    monkeypatch.setattr(filet, "initialize_lora_filet_weights", full)
    assert error_of(capsys, [*init, "--batch-size", "auto"]) == "filet: error: out of memory"
    assert sizes == [24, 12, 6, 3, 1]

    def later(*_: Any, **__: Any) -> None:
        raise filet.OutOfMemoryError("out of memory later", "selection", None)

    monkeypatch.setattr(filet, "initialize_lora_filet_weights", later)
    assert "later" in error_of(capsys, [*init, "--batch-size", "auto"])


def test_an_existing_adapter_is_kept_unless_told(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "adapter"
    output.mkdir(parents=True)
    few = ["--target-modules", "q_proj"]
    assert main(init + few) == 0  # an empty folder is taken
    before = contents(output)
    assert "is not empty; --overwrite replaces it" in error_of(capsys, init)
    assert contents(output) == before
    (output / "checkpoint").mkdir()
    (output / "checkpoint" / "old").touch()
    assert main([*init, "--target-modules", "k_proj", "--overwrite"]) == 0
    after = contents(output)
    assert after.keys() == before.keys()
    assert after != before
    assert [path.name for path in output.parent.iterdir()] == ["adapter"]


def test_overwrite_replaces_adapters_only(
    init: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "adapter"
    output.mkdir(parents=True)
    (output / "thesis.tex").touch()
    assert "holds no adapter" in error_of(capsys, [*init, "--overwrite"])
    (output / "adapter_config.json").touch()
    shutil.copy(data, output / "data.jsonl")
    inside = ["--data", str(output / "data.jsonl"), "--overwrite"]
    assert "which is read" in error_of(capsys, init + inside)
    assert (output / "thesis.tex").exists()
    assert "is a file" in error_of(capsys, [*init, "--output", str(data), "--overwrite"])


def test_an_existing_file_of_statistics_is_kept_unless_told(
    init: list[str],
    stats: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "s.safetensors"
    output.write_bytes(b"precious")
    command = [*stats, "--data", str(data), "--target-modules", "q_proj", "--output", str(output)]
    assert "exists; --overwrite replaces it" in error_of(capsys, command)
    message = error_of(capsys, [*init, "--save-statistics", str(output)])
    assert "--save-statistics" in message and "exists" in message
    assert output.read_bytes() == b"precious"
    assert main([*command, "--overwrite"]) == 0
    assert output.read_bytes() != b"precious"
    merge = arguments("stats", "--merge", output, output, "--output", output, "--overwrite")
    assert "is also read" in error_of(capsys, merge)
    wrong = error_of(capsys, [*stats, "--data", str(data), "--output", str(tmp_path / "s.bin")])
    assert "must be a .safetensors file" in wrong


@pytest.mark.parametrize("option", ["--output", "--save-statistics"])
def test_a_place_where_nothing_can_be_made(
    option: str, init: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is looked at."""
    goal = data / "deeper" / "goal"
    message = error_of(capsys, [*init, "--model", "nowhere", option, str(goal)])
    assert f"{goal}: Not a directory ({data})" in message


def test_statistics_do_not_take_the_place_of_weights(
    init: list[str],
    stats: list[str],
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before, weights = contents(folder), folder / "model.safetensors"
    for command, option in (([*init], "--save-statistics"), ([*stats, "--data", data], "--output")):
        argv = arguments(*command, "--model", folder, "--overwrite", option, weights)
        assert f"{option}: {weights} lies in {folder}, which is also read" in error_of(capsys, argv)
    assert contents(folder) == before


@pytest.mark.parametrize("step", ["save_as_lora", "report", "picture"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    init: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    existing: bool,
) -> None:
    init += ["--target-modules", "q_proj"]
    output = tmp_path / "out" / "adapter"
    if existing:
        assert main(init) == 0
        init += ["--overwrite", "--seed", "1", "--select", "max"]
    before = contents(tmp_path)

    def full(*args: Any, **_: Any) -> None:
        for folder in (value for value in args if isinstance(value, Path) and value.is_dir()):
            (folder / "half").write_bytes(b"written")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = {
        "save_as_lora": (saved, "save_as_lora"),
        "report": (FiletReport, "save"),
        "picture": (FiletReport, "plot"),
    }[step]
    monkeypatch.setattr(owner, name, full)
    assert error_of(capsys, init) == f"filet: error: {output}: No space left on device"
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []
    assert output.exists() == existing


def test_a_full_disk_under_statistics(
    stats: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path)
    command = [*stats, "--data", str(data), "--target-modules", "q_proj"]
    output = tmp_path / "s.safetensors"
    with files_up_to(2_000):
        message = error_of(capsys, [*command, "--output", str(output)])
    assert message == f"filet: error: {output}: File too large"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("function", ["initialize_lora_filet_weights", "save_as_lora"])
def test_ctrl_c_leaves_nothing(
    init: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved if function == "save_as_lora" else filet, function, interrupt)
    before = contents(tmp_path)
    assert main([*init, "--target-modules", "q_proj"]) == 130
    assert "filet: interrupted" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert not (tmp_path / "out" / "adapter").exists()
