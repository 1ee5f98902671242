"""Models that the command line refuses, in one line, before it runs anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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

import models
from filet.cli.main import main


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
        command = arguments(*init, "--model", folder, "--task", "causal-lm", "--engine", engine)
        message = error_of(capsys, command)
        assert str(folder) in message and said in message, engine
    output = tmp_path / "statistics.safetensors"
    command = arguments(*stats, "--model", folder, "--data", data, "--output", output)
    assert said in error_of(capsys, [*command, "--task", "causal-lm"])
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

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = (weights[name] * 9).to(getattr(torch, kind))

    folder = with_weights(model_folder, tmp_path / "quantised", quantise)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # which is then that of the first floating weight, lm_head's
    (folder / "config.json").write_text(json.dumps(config))
    for engine in ("memory", "blockwise", "auto"):
        message = error_of(capsys, [*init, "--model", str(folder), "--engine", engine])
        assert f"{name} is {kind} in {folder}, and config.json has no" in message, engine
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
    command = [*without_data(init), *few, "--statistics", str(collected)]
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
