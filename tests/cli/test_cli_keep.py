"""The command line with data to keep: files, the model's own text, statistics, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of, sentence, without_data

import filet
from filet.cli.main import main
from filet.report.report import FiletReport

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    """Plain text, a line a sample."""
    path = tmp_path / "keep.txt"
    path.write_text("".join(sentence(n) + "\n" for n in range(100, 113)))
    return path


def test_a_file_to_keep(
    init: list[str], stats: list[str], data: Path, keep: Path, tmp_path: Path
) -> None:
    """At once, with statistics saved on the way, and from statistics: the same adapter."""
    saved, file = tmp_path / "saved.safetensors", tmp_path / "stats.safetensors"
    outs = [tmp_path / name for name in ("one", "two", "three")]
    assert main([*init, "--keep", str(keep), "--output", str(outs[0])]) == 0
    assert main(
        [*init, *arguments("--keep", keep, "--save-statistics", saved, "--output", outs[1])]
    ) == 0  # fmt: skip
    assert main([*stats, *arguments("--data", data, "--keep", keep, "--output", file)]) == 0
    plain = without_data(init)
    assert main([*plain, *arguments("--statistics", file, "--output", outs[2])]) == 0
    reports = [FiletReport.load(out) for out in outs]
    assert [report.config["select"] for report in reports] == 3 * ["contrast"]
    tokens = sum(len(line.split()) + 1 for line in keep.read_text().splitlines())
    kept = {"samples": 13, "tokens": tokens, "from": "batches"}
    assert [report.keep for report in reports] == 3 * [kept]
    statistics = [filet.Statistics.load(path) for path in (saved, file)]
    assert [each.keep_samples for each in statistics] == [13, 13]
    assert statistics[0].keep_tokens == statistics[1].keep_tokens > 13
    weights = [adapter_weights(out) for out in outs]
    for name, weight in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name].abs(), weight.abs(), rtol=1e-3, atol=1e-4)
    # What is kept decides: without it the adapter is another.
    assert main([*init, "--output", str(tmp_path / "four")]) == 0
    four = FiletReport.load(tmp_path / "four")
    assert four.config["select"] == "min" and four.keep == {}
    assert "data to keep" not in (tmp_path / "four" / "README.md").read_text() + four.table()


def test_damping_and_fields_of_the_data_alone(init: list[str], keep: Path, tmp_path: Path) -> None:
    data = tmp_path / "named.jsonl"
    data.write_text("".join(json.dumps({"body": sentence(n)}) + "\n" for n in range(9)))
    argv = arguments("--data", data, "--text-field", "body", "--keep", keep, "--damping", 0.5)
    assert main([*init, *argv, "--select", "contrast"]) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.config["damping"] == 0.5 and report.samples == 9
    # λ is at most 1 / δ times what a unit vector can have of a moment of mean 1.
    assert all(float(m.energies.max()) <= 16 / 0.5 for m in report.modules.values())


def test_no_sample_to_keep_is_said_of_the_data_to_keep(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n')
    line = error_of(capsys, [*init, "--keep", str(path)])
    assert "data to keep: no usable sample among 1" in line


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_what_is_kept_needs_nothing_to_predict(
    engine: str, init: list[str], data: Path, tmp_path: Path
) -> None:
    """Prompts longer than --max-length, and ids without an answer, are kept as far as they go."""
    path, argv = tmp_path / "keep.jsonl", ["--max-length", "6", "--engine", engine]
    path.write_text(json.dumps({"prompt": f"{sentence(1)} {sentence(2)}", "completion": "."}))
    assert main([*init, *argv, "--keep", str(path)]) == 0
    kept = FiletReport.load(tmp_path / "out" / "adapter").keep
    assert (kept["samples"], kept["tokens"]) == (1, 6)
    path.write_text(json.dumps({"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}))
    assert main([*init, *argv, "--keep", str(path), "--overwrite"]) == 0
    kept = FiletReport.load(tmp_path / "out" / "adapter").keep
    assert (kept["samples"], kept["tokens"]) == (1, 3)


def test_the_models_own_text(
    init: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was, and by which seed, is in the report and on the card, by statistics too."""
    saved, applied = tmp_path / "saved.safetensors", tmp_path / "applied"
    argv = arguments("--keep", "self", "--samples", 3, "--seed", 7, "--save-statistics", saved)
    assert main([*init, *argv]) == 0
    statistics = filet.Statistics.load(saved)
    assert statistics.keep_samples == 3 and statistics.keep_tokens == 3 * 256
    plain = without_data(init)
    assert main([*plain, *arguments("--statistics", saved, "--output", applied)]) == 0
    said = "3 samples, 768 tokens, from the model itself, seed 7"
    for folder in (tmp_path / "out" / "adapter", applied):
        capsys.readouterr()
        assert main(["inspect", str(folder)]) == 0
        assert f"\ndata to keep  {said}\n" in capsys.readouterr().out
        assert f"| data to keep | {said} |" in (folder / "README.md").read_text()
    # Statistics of energies alone have no use for it, and merged ones say both.
    least = arguments("--statistics", saved, "--select", "min", "--output", applied, "--overwrite")
    assert main([*plain, *least]) == 0
    assert FiletReport.load(applied).keep == {}
    other = tmp_path / "other.safetensors"
    again = arguments("--keep", data, "--save-statistics", other, "--overwrite")
    assert main([*init, *again]) == 0
    both = statistics.merge(filet.Statistics.load(other))
    assert both.keep_from == "the model itself, seed 7 and batches" and both.keep_samples == 27
    assert statistics.merge(statistics).keep_from == statistics.keep_from


def test_a_file_to_keep_block_by_block(
    init: list[str], data: Path, keep: Path, tmp_path: Path
) -> None:
    """Also by the statistics that either engine saved."""
    argv, found = arguments("--keep", keep, "--samples", 11, "--batch-size", 4), []
    for engine in ("memory", "blockwise"):
        out, saved = tmp_path / engine, tmp_path / f"{engine}.safetensors"
        more = arguments("--engine", engine, "--output", out, "--save-statistics", saved)
        assert main([*init, *argv, *more]) == 0
        plain = without_data(init)
        applied = tmp_path / f"{engine}-applied"
        assert main([*plain, *arguments("--statistics", saved, "--output", applied)]) == 0
        for path in (out, applied):
            report = FiletReport.load(path)
            assert report.config["select"] == "contrast"
            assert (report.keep["samples"], report.keep["from"]) == (11, "batches")
            found.append(adapter_weights(path))
    for other in found[1:]:
        for name, weight in found[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep", "self", "--select", "min"], "keep= has no effect with select='min'"),
        (["--select", "contrast"], "select='contrast' without moments of data to keep"),
        (["--keep", "nowhere.txt"], "no data file at nowhere.txt"),
        (
            ["--keep", "self", "--engine", "blockwise"],
            "keep='self' is text drawn token by token through the whole model",
        ),
        (["--damping", "0.1"], "damping=0.1 has no effect with select='min'"),
        (["--keep", "self", "--no-orthogonal"], "orthogonal=False has no effect with select='con"),
        (["--keep", "self", "--rank", "16"], "rank 16 exceeds the 8 that a product B A"),
    ],
)
def test_what_is_refused(
    argv: list[str],
    message: str,
    init: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before a pass, also one whose statistics are to be saved."""
    saved = tmp_path / "saved.safetensors"
    for more in ([], ["--save-statistics", str(saved)]):
        assert message in error_of(capsys, [*init, *argv, *more])
        assert not saved.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("init --model m --statistics s --output o --keep self", "--keep is for 'filet stats'"),
        ("init --model m --statistics s --output o --engine blockwise", "need the whole model"),
        ("init --model m --data d.txt --output o --damping 0", "must be a positive number"),
        ("init --model m --statistics s --output o --samples 5", "--samples is for data"),
        ("init --model m --statistics s --output o --count-prompt", "--count-prompt is for data"),
        ("stats --merge a b --output o --fisher sampled", "--merge has what was taken"),
        ("stats --merge a b --output o --keep self", "--merge excludes --model, --data, --keep"),
        ("stats --merge a b --output o --shard 1/2", "--data, --keep and --shard"),
        ("stats --model m --data d --output o --shard 1/2 --keep self", "from a file"),
    ],
)
def test_wrong_usage(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
