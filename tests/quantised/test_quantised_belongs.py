"""What belongs to which base: unquantised layers among quantised ones, casts, other codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from quantised_bases import (
    batches,
    initialised,
    kinds,
    logits,
    peft_of,
    plain,
    quantised,
    trainer_of,
    values,
)
from transformers import BitsAndBytesConfig

import filet
from filet import FiletConfig, Statistics, apply_statistics, collect_statistics
from filet.model.factors import StartedFactor

# B0 A0 = W V̂ V̂ᵀ: a frozen half that were lost would change the logits by their own size.
LOUD = {"start": "untouched", "normalization": "mean", "orthogonal": False, "scaling": "singular"}
MIXED = ["q_proj", "up_proj", "lm_head"]  # of which only the first is quantised


def mixed(kind: str) -> Any:
    """A base in bfloat16 of which two targets are left as they are."""
    how: dict[str, Any] = {"llm_int8_skip_modules": ["lm_head", "up_proj"]}
    if kind == "nf4":
        how |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        how |= {"bnb_4bit_compute_dtype": torch.bfloat16}
    else:
        how |= {"load_in_8bit": True}
    config = BitsAndBytesConfig(**how)
    return plain(torch.bfloat16, quantization_config=config, device_map={"": "cpu"})


def prepared(model: Any) -> Any:
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def bases(kind: str) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """A base in bfloat16, the same after a cast that loses nothing, and one with other weights."""
    if kind == "plain":
        return (
            lambda: plain(torch.bfloat16),
            lambda: plain(torch.bfloat16).float(),
            lambda: plain(torch.float32),
        )

    def other() -> Any:
        model = prepared(mixed(kind))
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= 1 + 2**-20  # no bfloat16
        return model

    return lambda: mixed(kind), lambda: prepared(mixed(kind)), other


BASES = pytest.mark.parametrize("kind", ["plain", *kinds("nf4", "int8")])


@pytest.mark.parametrize("cast_first", [True, False])
@BASES
def test_a_cast_that_loses_nothing_leaves_the_base(
    kind: str, cast_first: bool, tmp_path: Path
) -> None:
    """An adapter of either loads on the other, and not where a value was rounded."""
    whole, cast, other = bases(kind)
    first, second = (cast, whole) if cast_first else (whole, cast)
    peft_model = peft_of(first(), target_modules=MIXED)
    initialised(peft_model, **LOUD)
    filet.save_as_lora(peft_model, tmp_path)
    for base in (first, second):
        loaded = filet.load(base(), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(base()), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"belongs to .*base.*: the weight of .* is ") as refused:
        filet.load(other(), tmp_path)
    assert "lm_head" in str(refused.value) or "_proj" in str(refused.value)


@pytest.mark.parametrize("cast_first", [True, False])
@BASES
def test_statistics_of_a_base_before_and_after_a_cast(kind: str, cast_first: bool) -> None:
    whole, cast, other = bases(kind)
    first, second = (cast, whole) if cast_first else (whole, cast)
    taken = collect_statistics(
        peft_of(first(), target_modules=MIXED),
        batches(),
        FiletConfig(samples=None),
        show_progress_bar=False,
    )
    for base in (first, second):
        report = apply_statistics(peft_of(base(), target_modules=MIXED), taken)
        assert len(report.modules) == 5
    with pytest.raises(ValueError, match="belong to "):
        apply_statistics(peft_of(other(), target_modules=MIXED), taken)


def statistics_of(model: Any) -> Statistics:
    return collect_statistics(
        peft_of(model), batches(), FiletConfig(samples=None), show_progress_bar=False
    )


@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_codes_from_another_dtype_are_refused_by_their_cause(kind: str) -> None:
    """The base quantised from float32, and from what that is in bfloat16."""
    taken = statistics_of(quantised(kind, torch.bfloat16))
    name = next(iter(values(quantised(kind)).values())).kind
    with pytest.raises(ValueError) as refused:
        apply_statistics(peft_of(quantised(kind, torch.float32)), taken)
    said = str(refused.value)
    assert f" is {name}:64x64:" in said and "(kind:shape:hash)" in said
    assert "quantised from the same dtype (dtype= of from_pretrained)" in said
    assert "\n" not in said
    with pytest.raises(ValueError, match=r"other statistics.*quantised from the same dtype"):
        taken.merge(statistics_of(quantised(kind, torch.float32)))


@pytest.mark.filterwarnings("ignore:Merge lora module to")
@pytest.mark.parametrize("kind", kinds("nf4 twice", "int8", "hqq", "torchao"))
def test_codes_after_a_merge_are_refused_by_their_cause(kind: str, tmp_path: Path) -> None:
    """PEFT's merge and unmerge quantise W anew, each of them."""
    peft_model = peft_of(quantised(kind))
    initialised(peft_model)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.05)
    peft_model.merge_adapter()
    peft_model.unmerge_adapter()
    initialised(peft_model, **LOUD)
    filet.save_as_lora(peft_model, tmp_path)
    with pytest.raises(ValueError, match="no adapter merged into them and unmerged"):
        filet.load(quantised(kind), tmp_path)


# The callback in a Trainer, stopped and resumed.


def trained(base: Any, folder: Path, steps: int, resume: bool, **how: Any) -> tuple[Any, Any]:
    """A run of a script that is started: the model, and the callback's report."""
    config, lora = how.pop("config", LOUD), how.pop("lora", {})
    callback = filet.FiletInitCallback(FiletConfig(**config, samples=None))
    peft_model = peft_of(base, **lora)
    trainer_of(peft_model, folder, steps, callbacks=[callback]).train(resume_from_checkpoint=resume)
    assert "load_adapter" not in vars(peft_model)
    return peft_model.eval(), callback.report


def begun(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: m.start for n, m in peft_model.named_modules() if isinstance(m, StartedFactor)}


def base_of(kind: str) -> Any:
    return plain() if kind in ("plain", "rslora") else quantised(kind)


@pytest.mark.parametrize("config", [{}, LOUD], ids=["zero", "untouched"])
@pytest.mark.parametrize("kind", ["plain", "rslora", *kinds("nf4", "int8", "hqq", "torchao")])
def test_a_callback_resumes(kind: str, config: Any, tmp_path: Path) -> None:
    """Stopped after two steps and started again, the run ends where one in one go does."""
    how: Any = {"config": config, "lora": {"use_rslora": kind == "rslora"}}
    expected, report = trained(base_of(kind), tmp_path / "one go", 4, False, **how)
    assert report is not None
    trained(base_of(kind), tmp_path / "two", 2, False, **how)
    found, report = trained(base_of(kind), tmp_path / "two", 4, True, **how)
    assert report is None
    assert len(begun(expected)) == (16 if config else 0)
    states = [model.state_dict() for model in (found, expected)]
    for name, tensor in states[1].items():
        if "lora_" in name:
            torch.testing.assert_close(states[0][name], tensor, rtol=1e-6, atol=1e-7)
    starts = begun(found)
    assert starts.keys() == begun(expected).keys()
    assert all(torch.equal(starts[name], start) for name, start in begun(expected).items())
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)
    found.save_pretrained(tmp_path / "saved")
    again = filet.load(base_of(kind), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 4}, "of rank 8 at .*q_proj, where adapter 'default' has rank 4; expected the Lora"),
        ({"target_modules": ["q_proj"]}, "of rank 8 at .*_proj, where .* has none; expected"),
    ],
)
def test_a_callback_does_not_resume_another_adapter(lora: Any, said: str, tmp_path: Path) -> None:
    trained(plain(), tmp_path, 2, False)
    with pytest.raises(ValueError, match=said):
        trained(plain(), tmp_path, 4, True, lora=lora)


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_a_callback_does_not_resume_on_another_base(kind: str, tmp_path: Path) -> None:
    trained(quantised(kind), tmp_path, 2, False)
    with pytest.raises(ValueError, match=r"base in nf4 .*the weight of .* is float32"):
        trained(plain(), tmp_path, 4, True)
    (tmp_path / "checkpoint-2" / "filet.json").unlink()
    with pytest.raises(ValueError, match=r"has no filet.json"):
        trained(quantised(kind), tmp_path, 4, True)
