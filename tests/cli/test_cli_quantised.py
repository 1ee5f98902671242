"""``filet init`` and ``filet stats`` with --quantize, and on a folder that is quantised already."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of

from filet.cli.main import main

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
    from_file = [each for each in init if each not in ("--data", str(data))]
    from_file += ["--statistics", taken, "--overwrite"]
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


def test_options_that_do_not_fit(init: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        (["--double-quant"], "--double-quant is for --quantize nf4 or fp4"),
        (["--quantize", "int8", "--double-quant"], "--double-quant is for --quantize nf4 or fp4"),
        (["--quantize", "gptq"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            main(arguments(*init, *more))
        assert said in capsys.readouterr().err
