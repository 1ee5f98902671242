"""What a card says of a quantised base: its code loads that base again, or says that it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from quantised_bases import initialised, kinds, logits, of_bits, peft_of, plain, quantised, trained

import filet
from initialised import code_of, run

bitsandbytes = pytest.importorskip("bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


BASES = {
    "a head in 4 bits": lambda: of_bits(torch.float32, llm_int8_skip_modules=[], **NF4),
    "some layers left whole": lambda: of_bits(
        torch.float32, llm_int8_skip_modules=["lm_head", "q_proj", "down_proj"], **NF4
    ),
    "prepared": lambda: prepare_model_for_kbit_training(
        of_bits(torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16, **NF4)
    ),
    "int8 with outliers": lambda: of_bits(
        torch.float32, load_in_8bit=True, llm_int8_threshold=0.5, llm_int8_skip_modules=["q_proj"]
    ),
}


def saved(model: Any, folder: Path, start: str) -> tuple[PeftModel, str]:
    """A trained adapter, saved; and the code of its card, of that folder."""
    peft_model = peft_of(model)
    report = initialised(peft_model, start=start)
    trained(peft_model.train())
    filet.save_as_lora(peft_model, folder, report=report)
    on_cpu = '    device_map={"": "cpu"},\n'  # where there is a GPU
    code = code_of((folder / "README.md").read_text(), folder)
    return peft_model, code.replace("    dtype=", f"{on_cpu}    dtype=")


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("base", BASES)
def test_its_code_loads_the_base_that_it_was(base: str, start: str, tmp_path: Path) -> None:
    peft_model, code = saved(BASES[base](), tmp_path, start)
    loaded: Any = run(code)
    if base == "prepared":
        loaded = prepare_model_for_kbit_training(loaded)
    torch.testing.assert_close(
        logits(loaded.train()), logits(peft_model.train()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", kinds("torchao", "hqq"))
def test_what_from_pretrained_would_not_quantise_so_is_left_to_the_user(
    kind: str, tmp_path: Path
) -> None:
    _, code = saved(quantised(kind), tmp_path, "zero")
    assert "base = ...  # the LlamaForCausalLM above, quantised as it was" in code
    assert "from_pretrained(base, folder" in code


def test_what_was_dequantised_as_it_was_loaded_is_left_to_the_user(tmp_path: Path) -> None:
    """Its folder says that it is quantised, and from_pretrained would load it so."""
    of_bits(torch.float32, **NF4).save_pretrained(tmp_path / "nf4")
    model = plain()
    model.save_pretrained(tmp_path / "whole")
    for folder, said in (
        ("nf4", "base = ...  # the LlamaForCausalLM above, dequantised"),
        ("whole", "base = LlamaForCausalLM.from_pretrained("),
    ):
        model.name_or_path = model.config._name_or_path = str(tmp_path / folder)
        assert said in saved(model, tmp_path / f"of {folder}", "zero")[1]
        model = plain()


def test_the_report_of_another_adapter_is_no_reason_not_to_save(tmp_path: Path) -> None:
    report = initialised(peft_of(plain(), target_modules=["q_proj", "k_proj"]))
    peft_model = peft_of(plain(), target_modules=["q_proj"])
    filet.save_as_lora(peft_model, tmp_path, report=report)
    assert "from_pretrained(" in (tmp_path / "README.md").read_text()
