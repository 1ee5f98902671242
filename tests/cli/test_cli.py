"""The command line: what it writes and prints, its plan, its messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import (
    adapter_weights,
    arguments,
    error_of,
    sentence,
    without_data,
)
from safetensors.torch import load_file, save_file

import filet
from filet.cli.main import main
from filet.report.names import REPORT_FILE
from filet.report.report import FiletReport

MODULES = [
    f"model.layers.{layer}.{kind}"
    for layer in range(2)
    for kind in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_init_writes_an_adapter_that_plain_peft_loads(
    start: str,
    init: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main([*init, *(["--start", start] if start != "zero" else [])]) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "out" / "adapter"
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        REPORT_FILE,
        "energies.png",
    }
    assert ("filet.json" in names) == (start == "untouched")
    assert [path.name for path in output.parent.iterdir()] == ["adapter"]
    assert (output / "energies.png").read_bytes().startswith(b"\x89PNG")
    plain = tmp_path / "plain"
    plain.mkdir()
    assert output.stat().st_mode == plain.stat().st_mode

    report = FiletReport.load(output)
    assert list(report.modules) == MODULES
    assert report.samples == 24
    assert {module.rank for module in report.modules.values()} == {4}
    assert report.table() in printed
    assert str(output) in printed

    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        expected = base(ids).logits
        adapted = PeftModel.from_pretrained(base, output).eval()
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
        # Not because it does nothing: with its first half scaled, or B off 0, the function differs.
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                assert parameter.any() == (start == "untouched")
                parameter[:, :4] += parameter.new_ones(4) if start == "zero" else parameter[:, :4]
        assert (adapted(ids).logits - expected).abs().max() > 1e-3


def test_options_reach_the_adapter(init: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out" / "adapter"
    chosen = ["--alpha", "10", "--rslora", "--target-modules", "q_proj", "down_proj"]
    chosen += ["--select", "random", "--scaling", "constant-min", "--normalization", "sum"]
    chosen += ["--seed", "5", "--samples", "7", "--fisher", "sampled"]
    assert main(init + chosen) == 0
    report = FiletReport.load(output)
    assert list(report.modules) == [
        name for name in MODULES if name.endswith(("q_proj", "down_proj"))
    ]
    assert report.samples == 7
    for key, value in {
        "select": "random",
        "scaling": "constant_min",
        "normalization": "sum",
        "fisher": "sampled",
        "seed": 5,
    }.items():
        assert report.config[key] == value
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 10, True)

    assert main([*init, *chosen, "--start", "untouched", "--overwrite"]) == 0
    assert FiletReport.load(output).config["start"] == "untouched"
    # The saved adapter is a plain LoRA of twice the rank with the scaling of rslora.
    saved = json.loads((output / "adapter_config.json").read_text())
    assert saved["r"] == 8
    assert saved["lora_alpha"] / saved["r"] == 10 / 4**0.5
    assert not saved["use_rslora"]


def test_alpha_is_the_rank_by_default(init: list[str], tmp_path: Path) -> None:
    assert main([*init, "--target-modules", "q_proj"]) == 0
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == saved["r"] == 4


def test_gamma(init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of ‖A_i‖² over a layer's rows."""
    output = tmp_path / "out" / "adapter"
    for chosen, gamma in (([], 4 / 3), (["--gamma", "2"], 2.0)):
        assert main([*init, *chosen, "--overwrite"]) == 0
        assert FiletReport.load(output).config["gamma"] == gamma
        for name, value in adapter_weights(output).items():
            if "lora_A" in name:
                assert float(value.square().sum(1).mean()) == pytest.approx(gamma, rel=1e-5), name
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert "start=zero" in capsys.readouterr().out.replace("\n", " ")
    wrong = [*init, "--gamma", "2", "--normalization", "sum", "--overwrite"]
    assert "gamma=2.0 has no effect with normalization='sum'; expected" in error_of(capsys, wrong)


def test_the_same_arguments_give_the_same_adapter(init: list[str], tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        assert main([*init, "--output", str(tmp_path / name)]) == 0
        results.append(adapter_weights(tmp_path / name))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_prompts_and_responses(init: list[str], data: Path, tmp_path: Path) -> None:
    data.write_text(
        "".join(json.dumps({"ask": sentence(n), "say": sentence(n + 1)}) + "\n" for n in range(6))
    )
    fields = ["--prompt-field", "ask", "--response-field", "say"]
    whole_ones = [*fields, "--count-prompt", "--output", str(tmp_path / "whole")]
    assert main([*init, *whole_ones]) == 0
    assert main([*init, *fields, "--output", str(tmp_path / "masked")]) == 0
    whole, masked = (FiletReport.load(tmp_path / name) for name in ("whole", "masked"))
    assert whole.tokens == masked.tokens
    assert 0 < masked.loss_terms < whole.loss_terms


def test_a_text_file(init: list[str], tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(sentence(n) for n in range(5)))
    assert main([*init, "--data", str(path)]) == 0
    assert FiletReport.load(tmp_path / "out" / "adapter").samples == 5


def test_dropped_samples_are_one_line_of_warning(
    init: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text(data.read_text() + json.dumps({"text": ""}) + "\n")
    assert main([*init, "--target-modules", "q_proj"]) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "dropped" in line] == [
        "filet: warning: dropped 1 of 25 samples: fewer than 2 tokens"
    ]


def test_samples_that_are_cut_are_counted(
    init: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the data and of those to keep; a sample has 5 to 13 tokens with its end."""
    kept = tmp_path / "keep.txt"
    kept.write_text("\n".join(sentence(n) for n in (0, 8)))  # 5 and 13
    assert main([*init, "--max-length", "9", "--keep", str(kept)]) == 0
    lengths = [len(sentence(n).split()) + 1 for n in range(24)]
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("cut ")] == [
        f"cut           {sum(n > 9 for n in lengths)} of 24 samples of --data were cut to 9 tokens "
        "(--max-length)",
        "cut           1 of 2 samples of --keep was cut to 9 tokens (--max-length)",
    ]
    assert main([*init, "--max-length", "13", "--overwrite"]) == 0
    assert "cut " not in capsys.readouterr().out


def test_saved_statistics_give_the_same_adapter(
    init: list[str], stats: list[str], data: Path, tmp_path: Path
) -> None:
    collected, kept = tmp_path / "collected.safetensors", tmp_path / "kept.safetensors"
    direct, applied, again = tmp_path / "direct", tmp_path / "applied", tmp_path / "again"
    no_data = without_data(init)

    assert main([*stats, "--data", str(data), "--output", str(collected)]) == 0
    assert main([*init, "--output", str(direct), "--save-statistics", str(kept)]) == 0
    assert main([*no_data, "--output", str(applied), "--statistics", str(collected)]) == 0
    assert main([*no_data, "--output", str(again), "--statistics", str(kept)]) == 0
    expected = adapter_weights(direct)
    for folder in (applied, again):
        weights = adapter_weights(folder)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), (folder.name, name)


def test_merged_statistics_equal_those_of_all_the_data(
    init: list[str], stats: list[str], data: Path, tmp_path: Path
) -> None:
    lines = data.read_text().splitlines(keepends=True)
    for name, part in {"a": lines[:9], "b": lines[9:12], "c": lines[12:], "all": lines}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        output = tmp_path / f"{name}.safetensors"
        assert (
            main([*stats, "--data", str(tmp_path / f"{name}.jsonl"), "--output", str(output)]) == 0
        )
    merged = tmp_path / "merged.safetensors"
    parts = [tmp_path / f"{name}.safetensors" for name in "abc"]
    assert main(arguments("stats", "--merge", *parts, "--output", merged)) == 0

    no_data = without_data(init)
    reports = []
    for source in (merged, tmp_path / "all.safetensors"):
        output = tmp_path / f"from-{source.stem}"
        assert main([*no_data, "--statistics", str(source), "--output", str(output)]) == 0
        reports.append(FiletReport.load(output))
    first, second = reports
    assert first.samples == second.samples == 24
    assert first.tokens == second.tokens
    for name, module in first.modules.items():
        torch.testing.assert_close(
            module.energies, second.modules[name].energies, rtol=1e-4, atol=0
        )


def test_statistics_of_another_model_are_refused(
    init: list[str],
    stats: list[str],
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    output, own = tmp_path / "other.safetensors", tmp_path / "own.safetensors"
    command = [*stats, "--data", str(data)]
    assert main([*command, "--model", str(other), "--output", str(output)]) == 0
    assert main([*command, "--output", str(own)]) == 0
    message = error_of(capsys, [*without_data(init), "--statistics", str(output)])
    assert "model.layers.1.mlp.up_proj" in message
    assert not (tmp_path / "out").exists()
    merged = tmp_path / "merged.safetensors"
    message = error_of(capsys, arguments("stats", "--merge", own, output, "--output", merged))
    assert "model.layers.1.mlp.up_proj" in message
    assert not merged.exists()
    message = error_of(capsys, arguments("stats", "--merge", own, data, "--output", merged))
    assert str(data) in message
    message = error_of(capsys, arguments("stats", "--merge", own, "nowhere", "--output", merged))
    assert "nowhere" in message


def test_inspect_reads_and_draws_where_it_is_told(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(init) == 0
    folder = tmp_path / "out" / "adapter"
    picture = (folder / "energies.png").read_bytes()
    (folder / "energies.png").write_bytes(b"of its own")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    table = FiletReport.load(folder).table()
    capsys.readouterr()
    elsewhere = tmp_path / "elsewhere.png"
    for argv in ([str(folder)], [str(folder)] * 2, [str(folder / REPORT_FILE)]):
        assert main(["inspect", *argv]) == 0
        assert (table in capsys.readouterr().out) == (len(argv) == 1)
    assert main(["inspect", str(folder / REPORT_FILE), "--plot", str(elsewhere)]) == 0
    assert elsewhere.read_bytes() == picture
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before
    assert main(["inspect", str(folder), "--plot", str(folder / "energies.png")]) == 0
    assert (folder / "energies.png").read_bytes() == picture


def test_inspect_without_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no filet report at" in error_of(capsys, ["inspect", str(tmp_path)])


def test_the_program_starts_without_torch() -> None:
    code = (
        "import sys, filet.cli.main; print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_help_and_inspect_do_not_load_transformers(init: list[str], tmp_path: Path) -> None:
    assert main([*init, "--target-modules", "q_proj"]) == 0
    code = """
import sys
from filet.cli.main import main
assert main(["inspect", sys.argv[1]]) == 0
try:
    main(["init", "--help"])
except SystemExit as end:
    assert end.code == 0
print(*{"transformers", "peft"} & sys.modules.keys(), file=sys.stderr)
"""
    folder = tmp_path / "out" / "adapter"
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert run.stderr.strip() == ""
    assert "--target-modules" in run.stdout


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"body": "x"}\n', [], "row 1: no known columns"),
        (
            '{"text": "a cat"}\n{"body": "x"}\n',
            [],
            "row 2: field 'text' must be a string, got None",
        ),
        ('{"text": "a cat"}\n{"text": \n', [], "line 2: not valid JSON"),
        ('{"text": "a cat"}\n', ["--prompt-field", "ask"], "row 1: no field 'ask'"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', [], "no chat template"),
        ('{"text": ""}\n', [], "no usable sample among 1: "),
        ("", [], "no sample in it"),
    ],
)
def test_bad_data(
    init: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    options: list[str],
    message: str,
) -> None:
    data.write_text(content)
    assert message in error_of(capsys, init + options)
    assert not (tmp_path / "out").exists()


def test_no_data_file(init: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.unlink()
    assert "no data file at" in error_of(capsys, init)


def test_debug_shows_the_traceback(init: list[str], data: Path) -> None:
    data.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="no known columns"):
        main([*init, "--debug"])


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, RuntimeError])
def test_bugs_keep_their_traceback(
    kind: type[Exception], init: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise kind("a bug")

    monkeypatch.setattr(filet, "initialize_lora_filet_weights", bug)
    with pytest.raises(kind, match="a bug"):
        main(init)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["init", "--model", "m", "--output", "o"], "--data --statistics is required"),
        (
            ["init", "--model", "m", "--output", "o", "--data", "d", "--statistics", "s"],
            "not allowed with",
        ),
        (
            "init --model m --output o --statistics s --save-statistics t".split(),
            "nothing to save",
        ),
        ("init --model m --output o --data d --rank 0".split(), "at least 1, got '0'"),
        ("init --model m --output o --data d --samples few".split(), "got 'few'"),
        ("init --model m --output o --data d --batch-size big".split(), "got 'big'"),
        ("stats --model m --output o --data d --passes 0".split(), "at least 1, got '0'"),
        ("init --model m --output o --data d --seed -1".split(), "got '-1'"),
        ("init --model m --output o --data d --max-length 1".split(), "must be at least 2"),
        (
            "init --model m --output o --data d --text-field a --prompt-field b".split(),
            "--text-field excludes",
        ),
        ("init --model m --output o --data d --response-field b".split(), "needs --prompt-field"),
        ("stats --output o".split(), "--model and --data required"),
        ("stats --output o --merge a".split(), "at least two"),
        ("stats --output o --merge a b --model m".split(), "excludes --model"),
        (
            "init --model m --output o --data d --target-modules .*q_proj".split(),
            "--target-modules '.*q_proj': expected names of layers",
        ),
        (
            "stats --model m --output o --data d --target-modules v_proj q_proj,k_proj".split(),
            "--target-modules 'q_proj,k_proj': expected names of layers with spaces",
        ),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
