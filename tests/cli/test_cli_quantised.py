"""``filet init`` and ``filet stats`` with --quantize, and on a folder that is quantised already."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of, sentence, without_data

from filet.cli.main import main
from made_data import write_jsonl
from models import CLASSES, case

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("how", [["nf4"], ["fp4", "--double-quant"], ["int8"]])
def test_statistics_serve_the_base_that_was_quantised_so(
    init: list[str], stats: list[str], data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], how: list[str],
) -> None:  # fmt: skip
    quantize, output = ["--quantize", *how], tmp_path / "out" / "adapter"
    taken = str(tmp_path / "s.safetensors")
    assert main([*init, *quantize, "--samples", "all"]) == 0
    of_data = adapter_weights(output)
    assert main([*stats, *quantize, "--data", str(data), "--output", taken]) == 0
    from_file = [*without_data(init), "--statistics", taken, "--overwrite"]
    assert main([*from_file, *quantize]) == 0
    again = adapter_weights(output)
    assert of_data.keys() == again.keys()
    assert all(torch.equal(of_data[key], again[key]) for key in again)
    line = error_of(capsys, from_file)  # on the same folder, not quantised
    assert f"belong to a base in {how[0]}" in line and "is float32 in this model" in line
    assert main([*init, "--overwrite", "--samples", "all"]) == 0
    plain = adapter_weights(output)
    assert not all(torch.equal(plain[key], again[key]) for key in again)


@pytest.mark.usefixtures("no_picture")
def test_a_quantised_folder_is_loaded_as_it_is(
    init: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from filet.model.folder import quantization_of

    folder, output = tmp_path / "four bits", tmp_path / "out" / "adapter"
    config = quantization_of(model_folder, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.float32  # the folder's
    model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    assert main([*init, "--quantize", "nf4"]) == 0
    expected = adapter_weights(output)
    assert main([*init, "--model", str(folder), "--overwrite"]) == 0
    found = adapter_weights(output)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    line = error_of(capsys, [*init, "--model", str(folder), "--quantize", "nf4", "--overwrite"])
    assert "is quantised already" in line and "--quantize" in line


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("new", [False, True], ids=["trained head", "new head"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_head_of_classes_is_left_whole(
    kind: str, new: bool, init: list[str], model_folder: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is trained whole and saved with the adapter; plain PEFT loads both."""
    from peft import PeftModel
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    folder, output = tmp_path / "bert", tmp_path / "out" / "adapter"
    model = case("bert class").model
    (model.base_model if new else model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    write_jsonl(data, *({"text": sentence(n), "label": n % CLASSES} for n in range(9)))
    command = arguments(*init, "--model", folder, "--task", "seq-cls")
    more = arguments("--new-head", 1, "--num-labels", CLASSES) if new else []
    assert main([*command, *more, "--quantize", kind]) == 0
    head = {key: v for key, v in adapter_weights(output).items() if "classifier" in key}
    assert head and all(value.is_floating_point() for value in head.values())

    def quantised(*whole: str, **storage: torch.dtype) -> Any:
        bits = {"load_in_4bit": kind == "nf4", "load_in_8bit": kind == "int8", **storage}
        config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=list(whole))
        return AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=config, num_labels=CLASSES
        )

    loaded = PeftModel.from_pretrained(quantised("classifier"), str(output))
    assert torch.isfinite(loaded(input_ids=torch.arange(2, 9)[None]).logits).all()
    found = loaded.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(found.weight, head["base_model.model.classifier.weight"])
    if new:
        return
    for storage in [torch.uint8, torch.bfloat16] if kind == "nf4" else [torch.int8]:
        packed = quantised("none of it", bnb_4bit_quant_storage=storage)
        packed.save_pretrained(tmp_path / "packed")
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "packed")
        line = error_of(capsys, [*command, "--model", str(tmp_path / "packed"), "--overwrite"])
        assert "classifier is quantised, and a head is trained whole" in line


def test_options_that_do_not_fit(init: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        (["--double-quant"], "--double-quant is for --quantize nf4 or fp4"),
        (["--quantize", "int8", "--double-quant"], "--double-quant is for --quantize nf4 or fp4"),
        (["--quantize", "gptq"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            main(arguments(*init, *more))
        assert said in capsys.readouterr().err
