"""The command line, run through ``main([...])`` on a tiny Llama made on the spot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import filet
import models
from filet.cli.main import main
from filet.report.names import REPORT_FILE
from filet.report.report import FiletReport

pytest.importorskip("transformers")
pytest.importorskip("peft")

WORDS = "the a cat dog bird sees hears finds and one two red blue small old house tree".split()
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


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"the command line opened a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def sentence(number: int) -> str:
    """Words that differ from one number to the next, 4 to 12 of them."""
    return " ".join(WORDS[(number * 7 + k * k * (number + 3)) % 17] for k in range(4 + number % 9))


@pytest.fixture(autouse=True, scope="module")
def settings() -> Iterator[None]:
    """One thread, as layers this small only wait for more; what the commands set, put back."""
    from transformers import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(24)))
    return path


@pytest.fixture
def init(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small ``filet init``; later ones win."""
    return arguments(
        "init", "--model", model_folder, "--data", data, "--output", tmp_path / "out" / "adapter",
        "--rank", 4, "--batch-size", 4, "--max-length", 16, "--device", "cpu", "--no-progress",
    )  # fmt: skip


@pytest.fixture
def stats(model_folder: Path) -> list[str]:
    return arguments(
        "stats", "--model", model_folder, "--batch-size", 4, "--max-length", 16,
        "--samples", "all", "--device", "cpu", "--no-progress",
    )  # fmt: skip


def arguments(*values: Any) -> list[str]:
    return [str(value) for value in values]


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run what must fail; its one line of error."""
    capsys.readouterr()
    assert main(argv) == 1
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("filet: error: ")
    ]
    assert len(lines) == 1
    return lines[0]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- init ------------------------------------------------------------------------------------------


def test_init_writes_an_adapter_that_plain_peft_loads(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(init) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "out" / "adapter"
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "filet.json",
        REPORT_FILE,
        "energies.png",
    }
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
        # Not because the adapter does nothing: with its first half scaled the function differs.
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter[:, :4] *= 1e4
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
    # The saved adapter is a plain LoRA of twice the rank with the scaling of rslora.
    saved = json.loads((output / "adapter_config.json").read_text())
    assert saved["r"] == 8
    assert saved["lora_alpha"] / saved["r"] == 10 / 4**0.5
    assert not saved["use_rslora"]


def test_alpha_is_the_rank_by_default(init: list[str], tmp_path: Path) -> None:
    assert main([*init, "--target-modules", "q_proj"]) == 0
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == saved["r"] == 8


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
    assert main([*init, *fields, "--output", str(tmp_path / "whole")]) == 0
    assert main([*init, *fields, "--mask-prompt", "--output", str(tmp_path / "masked")]) == 0
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
        "filet: warning: dropped 1 of 25 samples: fewer than 2 tokens, or no label left within "
        "max_length=16"
    ]


# -- statistics ------------------------------------------------------------------------------------


def test_saved_statistics_give_the_same_adapter(
    init: list[str], stats: list[str], data: Path, tmp_path: Path
) -> None:
    collected, kept = tmp_path / "collected.safetensors", tmp_path / "kept.safetensors"
    direct, applied, again = tmp_path / "direct", tmp_path / "applied", tmp_path / "again"
    at = init.index("--data")
    no_data = init[:at] + init[at + 2 :]

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

    at = init.index("--data")
    no_data = init[:at] + init[at + 2 :]
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
    at = init.index("--data")
    message = error_of(capsys, init[:at] + init[at + 2 :] + ["--statistics", str(output)])
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


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_prints_and_draws(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(init) == 0
    folder = tmp_path / "out" / "adapter"
    picture = (folder / "energies.png").read_bytes()
    (folder / "energies.png").unlink()
    table = FiletReport.load(folder).table()
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert table in capsys.readouterr().out
    assert (folder / "energies.png").read_bytes() == picture
    elsewhere = tmp_path / "elsewhere.png"
    assert main(["inspect", str(folder / REPORT_FILE), "--plot", str(elsewhere)]) == 0
    assert elsewhere.read_bytes() == picture


def test_inspect_without_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no filet report at" in error_of(capsys, ["inspect", str(tmp_path)])


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


# -- errors: data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"body": "x"}\n', [], "line 1: no known fields"),
        ('{"text": "a cat"}\n{"body": "x"}\n', [], "line 2: no field 'text'; found 'body'"),
        ('{"text": "a cat"}\n{"text": \n', [], "line 2: not valid JSON"),
        ('{"text": "a cat"}\n', ["--prompt-field", "ask"], "line 1: no field 'ask'"),
        ('{"text": "a cat"}\n', ["--mask-prompt"], "has no responses"),
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


# -- errors: model ---------------------------------------------------------------------------------


def test_a_hub_name_is_refused(init: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, [*init, "--model", "some-org/some-model"])
    assert "no folder 'some-org/some-model'" in message
    assert "nothing is downloaded" in message


def test_pickled_weights_need_a_flag(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    message = error_of(capsys, [*init, "--model", str(pickled)])
    assert "only pytorch_model.bin; --allow-pickle" in message
    assert not (tmp_path / "out").exists()
    few = ["--target-modules", "q_proj"]
    assert main([*init, *few, "--model", str(pickled), "--allow-pickle"]) == 0
    assert main([*init, *few, "--output", str(tmp_path / "safe")]) == 0
    expected = adapter_weights(tmp_path / "safe")
    for name, tensor in adapter_weights(tmp_path / "out" / "adapter").items():
        assert torch.equal(tensor, expected[name])


def test_safetensors_of_something_else_do_not_let_pickles_in(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").rename(pickled / "other.safetensors")
    error_of(capsys, [*init, "--model", str(pickled)])
    assert not (tmp_path / "out").exists()


def test_code_in_the_models_folder_is_not_run(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    custom, mark = tmp_path / "custom", tmp_path / "was-run"
    shutil.copytree(model_folder, custom)
    config = json.loads((custom / "config.json").read_text())
    config["model_type"] = "made_up"
    config["auto_map"] = {
        "AutoConfig": "code.MadeUpConfig",
        "AutoModelForCausalLM": "code.MadeUpModel",
    }
    (custom / "config.json").write_text(json.dumps(config))
    (custom / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    message = error_of(capsys, [*init, "--model", str(custom)])
    assert "--trust-remote-code runs it" in message
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_models(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no config.json in" in error_of(capsys, [*init, "--model", str(folder)])
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in error_of(capsys, [*init, "--model", str(folder)])


def with_tokenizer(model: Any, model_folder: Path, goal: Path) -> Path:
    """A folder of this model, and of the tiny one's tokenizer."""
    model.save_pretrained(goal)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, goal)
    return goal


@pytest.mark.parametrize("kind", models.UNFIT)
def test_models_of_another_task_or_without_a_head(
    kind: str,
    init: list[str],
    stats: list[str],
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever runs them: else their head is random, or they see their labels."""
    make, said = models.UNFIT[kind]
    folder = with_tokenizer(make(), model_folder, tmp_path / "unfit")
    for engine in ("memory", "blockwise", "auto"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert str(folder) in message and said in message, engine
    output = tmp_path / "statistics.safetensors"
    command = arguments(*stats, "--model", folder, "--data", data, "--output", output)
    assert said in error_of(capsys, command)
    assert not (tmp_path / "out").exists() and not output.exists()


@pytest.mark.parametrize("kind", models.FIT)
def test_models_that_only_look_so(
    kind: str, init: list[str], model_folder: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(models.FIT[kind](), model_folder, tmp_path / "fit")
    assert main([*init, "--model", str(folder), "--engine", "memory"]) == 0


def test_weights_that_are_missing_or_of_another_shape(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in (
        ({"num_hidden_layers": 3}, "has no weight for model.layers.2."),
        ({"intermediate_size": 28}, "expected (16, 28), as config.json describes it"),
        ({"vocab_size": 24}, "has shape (20, 16) in"),
    ):
        folder = changed(model_folder, tmp_path / said.split()[-1], **change)
        for engine in ("memory", "auto"):
            message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
            assert said in message and str(folder) in message
    assert not (tmp_path / "out").exists()


def changed(model_folder: Path, goal: Path, **settings: Any) -> Path:
    """A copy of the folder with another config."""
    shutil.copytree(model_folder, goal)
    config = json.loads((goal / "config.json").read_text())
    (goal / "config.json").write_text(json.dumps({**config, **settings}))
    return goal


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"dtype": "float31"}, "float31"),
        ({"hidden_act": "made_up"}, "made_up"),
        ({"rope_parameters": {"rope_type": "made_up", "rope_theta": 1e4}}, "made_up"),
    ],
    ids=str,
)
def test_configs_that_transformers_trips_over(
    settings: dict[str, Any],
    said: str,
    init: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(model_folder, tmp_path / "odd", **settings)
    for engine in ("memory", "blockwise"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert message.startswith(f"filet: error: {folder} cannot be loaded as a model: ")
        assert said in message


def test_damaged_weights(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for engine in ("memory", "blockwise"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert message.startswith(f"filet: error: {folder}")
        assert "incomplete metadata" in message
    weights.rename(folder / "pytorch_model.bin")
    message = error_of(capsys, [*init, "--model", str(folder), "--allow-pickle"])
    assert message.startswith(f"filet: error: {folder} cannot be loaded as a model: Unpickling")


def with_weights(
    folder: Path, goal: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of the folder whose weights ``change`` has changed."""
    shutil.copytree(folder, goal)
    weights = load_file(goal / "model.safetensors")
    change(weights)
    save_file(weights, goal / "model.safetensors", {"format": "pt"})
    return goal


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["int8", "uint8", "float8_e4m3fn"])
def test_quantised_weights_that_no_config_tells_of(
    kind: str,
    name: str,
    init: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their numbers alone are no weights, whoever loads them."""
    said = {"float8_e4m3fn": "F8_E4M3"}.get(kind, kind)

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = (weights[name] * 9).to(getattr(torch, kind))

    folder = with_weights(model_folder, tmp_path / "quantised", quantise)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # which is then that of the first floating weight, lm_head's
    (folder / "config.json").write_text(json.dumps(config))
    for engine in ("memory", "blockwise", "auto"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert f"{name} is {said} in {folder}, and config.json has no" in message, engine
        assert message.endswith("expected float64, float32, float16, bfloat16")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = error_of(capsys, [*init, "--model", str(folder), "--allow-pickle"])
    assert f"{name} is {kind} in {folder}, and config.json has no" in message
    assert not (tmp_path / "out").exists()


def test_what_else_is_no_floating_number_is_left_alone(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mask that old versions saved, and what belongs to no weight of the model."""

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["model.layers.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        weights["model.layers.0.mlp.up_proj.zeros"] = torch.ones(8, dtype=torch.int8)

    folder = with_weights(model_folder, tmp_path / "more", add)
    for engine in ("memory", "blockwise"):
        output = tmp_path / engine
        command = [*init, "--model", str(folder), "--engine", engine, "--output", str(output)]
        assert main(command) == 0
        warned = [line for line in capsys.readouterr().err.splitlines() if "does not use" in line]
        assert len(warned) == 1, engine
        assert "does not use, model.layers.0.mlp.up_proj.zeros; expected" in warned[0]


def test_a_weight_of_zeros_is_called_so(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def clear(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"].zero_()

    folder = with_weights(model_folder, tmp_path / "zeros", clear)
    for engine in ("memory", "blockwise"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert "model.layers.1.mlp.up_proj: all of its weight (24, 16) is zero" in message


def test_outputs_without_names(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(model_folder, tmp_path / "tuples", return_dict=False)
    for engine in ("memory", "blockwise"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert f"{folder} has return_dict false in config.json" in message


def test_folders_without_a_tokenizer(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One kind has none then, another is made all the same and knows no word."""
    llama, gpt2, broken = tmp_path / "llama", tmp_path / "gpt2", tmp_path / "broken"
    models.llama().save_pretrained(llama)
    models.case("gpt2").model.save_pretrained(gpt2)
    shutil.copytree(model_folder, broken)
    (broken / "tokenizer.json").write_text('{"odd": 1}')
    for folder, said in (
        (llama, f"no tokenizer can be loaded from {llama}"),
        (gpt2, f"the tokenizer in {gpt2} has no words"),
        (broken, f"no tokenizer can be loaded from {broken}"),
    ):
        message = error_of(capsys, [*init, "--model", str(folder)])
        assert message.startswith(f"filet: error: --model: {said}; expected its files")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_token_beyond_the_embeddings(
    engine: str,
    init: list[str],
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "grown"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    command = [*init, "--model", str(folder), "--engine", engine]
    assert main([*command, "--overwrite", "--target-modules", "q_proj"]) == 0  # nobody says it
    data.write_text(json.dumps({"text": "the zebra sees a cat"}) + "\n")
    message = error_of(capsys, [*command, "--overwrite"])
    assert "input_ids of batch 0 has 20; expected 0 … 19" in message
    # Padding is looked up as well.
    data.write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(4)))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    message = error_of(capsys, [*command, "--overwrite"])
    assert "input_ids of batch 0 has 21; expected 0 … 19, padding included" in message


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_samples_beyond_the_positions(
    engine: str,
    init: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Learned ones end; a rotary model's do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 9}
    config = GPT2Config(vocab_size=20, bos_token_id=2, eos_token_id=2, **settings)
    gpt2 = with_tokenizer(GPT2LMHeadModel(config), model_folder, tmp_path / "gpt2")
    command = [*init, "--model", str(gpt2), "--engine", engine]
    message = error_of(capsys, command)
    assert "input_ids of batch 0 has 13 tokens a sample; expected at most 9" in message
    assert "(--max-length 9)" in message
    assert main([*command, "--max-length", "9"]) == 0
    llama = changed(model_folder, tmp_path / "llama", max_position_embeddings=9)
    assert main([*init, "--overwrite", "--model", str(llama), "--engine", engine]) == 0


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["made_up"], "has 'made_up' (--target-modules)"),
        (["q_proj", "k_prj"], "has 'k_prj' (--target-modules), and LlamaForCausalLM no module"),
        (["q_proj", "mlp.upproj"], "expected names like 'mlp.up_proj'"),
        (["all-linear", "lm_head"], "'all-linear' (--target-modules)"),
    ],
    ids=str,
)
def test_unknown_target_modules(
    engine: str,
    names: list[str],
    said: str,
    init: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = error_of(capsys, [*init, "--engine", engine, "--target-modules", *names])
    assert said in message
    near = {"k_prj": "expected names like 'k_proj'", "made_up": "'q_proj', 'k_proj', 'v_proj'"}
    assert near.get(names[-1], "expected ") in message
    assert not (tmp_path / "out").exists()


def test_what_is_left_to_peft_depends_on_the_seed_alone(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding keeps PEFT's default; the process's own random state is left alone."""
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        output = tmp_path / str(number)
        chosen = ["--target-modules", "q_proj", "embed_tokens", "--seed", str(seed)]
        assert main([*init, *chosen, "--output", str(output)]) == 0
        assert torch.equal(torch.get_rng_state(), before)
        assert "model.embed_tokens (Embedding" in capsys.readouterr().err
        weights = adapter_weights(output)
        found.append(weights["base_model.model.model.embed_tokens.lora_embedding_B"])
    assert torch.equal(found[0], found[1]) and found[0].any()
    assert not torch.equal(found[0], found[2])


def test_statistics_in_another_dtype(
    init: list[str],
    stats: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    collected = tmp_path / "statistics.safetensors"
    few = ["--target-modules", "q_proj"]
    assert main(arguments(*stats, *few, "--data", data, "--output", collected)) == 0
    at = init.index("--data")
    command = [*init[:at], *init[at + 2 :], *few, "--statistics", str(collected)]
    message = error_of(capsys, [*command, "--dtype", "bfloat16"])
    assert "is bfloat16 in this model; expected float32" in message
    assert "(--dtype float32)" in message and "another base model" not in message
    assert main([*command, "--dtype", "float32"]) == 0


def test_no_memory_for_the_model(
    init: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    message = error_of(capsys, [*init, "--engine", "memory"])
    assert "out of memory in the loading of" in message and "2.00 GiB asked for" in message
    assert "--engine blockwise" in message and "--batch-size" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(init: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA device" in error_of(capsys, [*init, "--device", "cuda"])


def test_nan_in_the_model_is_an_error_in_one_line(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = error_of(capsys, [*init, "--model", str(broken)])
    assert "model.layers.1." in message
    assert not (tmp_path / "out").exists()


def test_a_rank_too_high_is_refused_before_the_pass(
    init: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaForCausalLM

    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    message = error_of(capsys, [*init, "--rank", "17"])
    assert "rank 17 exceeds its 16 candidate directions" in message
    assert not (tmp_path / "out").exists()


# -- plan and memory ----------------------------------------------------------------------------


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


# -- errors: output --------------------------------------------------------------------------------


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(filet.Statistics, "save", full)
    before = contents(tmp_path)
    command = [*stats, "--data", str(data), "--target-modules", "q_proj"]
    output = tmp_path / "s.safetensors"
    message = error_of(capsys, [*command, "--output", str(output)])
    assert message == f"filet: error: {output}: No space left on device"
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

    monkeypatch.setattr(filet, function, interrupt)
    before = contents(tmp_path)
    assert main([*init, "--target-modules", "q_proj"]) == 130
    assert "filet: interrupted" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert not (tmp_path / "out" / "adapter").exists()


# -- messages and usage ----------------------------------------------------------------------------


def test_debug_shows_the_traceback(init: list[str], data: Path) -> None:
    data.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="no known fields"):
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
