"""Writing into a model: whole copies, all or nothing, and the one-way residual."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import filet
from adapted import (
    CLOSE,
    TARGETS,
    assert_same,
    base_state,
    initialise,
    initialised,
    llama,
    logits,
    lora_layers,
    start,
    train,
    trainable,
    trained,
    wrap,
)
from adapter_cases import Failing, assert_unchanged, snapshot
from filet.adapter import write
from filet.model.factors import StartedFactor

pytestmark = pytest.mark.usefixtures("one_thread")


def _pickled(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: PeftModel = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(
    copied: Callable[[PeftModel], PeftModel], tmp_path: Path
) -> None:
    model = trained()
    expected, before = logits(model), snapshot(model)
    twice = copied(model)
    assert torch.equal(logits(twice), expected)
    train(twice)
    filet.save_as_lora(twice, tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(plain), logits(twice))
    for factor in twice.modules():
        if isinstance(factor, StartedFactor):
            factor.start.zero_()
    start(twice, select="max")
    assert_unchanged(model, before)


def test_initialising_again_replaces_the_first(tmp_path: Path) -> None:
    model = wrap(llama(), lora_bias=True, r=3, use_rslora=True)
    start(model, select="max")
    train(model)  # also the bias of B, which is to be zero again
    start(model)
    fresh = start(wrap(llama(), lora_bias=True, r=3, use_rslora=True))
    assert_same(model.state_dict(), fresh.state_dict())
    assert vars(model.peft_config["default"]) == vars(fresh.peft_config["default"])
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    train(model)
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(plain), logits(model))


PLACES = {
    "the first factor": ("_write", 1),
    "a factor": ("_write", 6),
    "a start": ("begin", 5),
    "a rank": ("set_rank", 3),
    "the config": ("describe", 1),
}


@pytest.mark.parametrize(
    ("error", "after"), [(MemoryError("full"), False), (KeyboardInterrupt(), True)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("before", ["plain", "initialised", "meta"])
def test_an_exception_leaves_everything_as_it_was(
    before: str,
    place: str,
    error: BaseException,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_bias=True, use_rslora=True)
    model = get_peft_model(llama(), config, low_cpu_mem_usage=before == "meta")
    if before == "initialised":
        start(model, select="max")
        train(model)
    as_it_was = snapshot(model)
    name, k = PLACES[place]
    owner = StartedFactor if name == "begin" else write
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Failing(getattr(owner, name), k, error, after))
        with pytest.raises(type(error)):
            start(model)
    if before == "meta":
        assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
        as_it_was["tensors"] = {n: v for n, v in as_it_was["tensors"].items() if not v.is_meta}
        assert_same(base_state(model), base_state(llama()))
    else:
        assert_unchanged(model, as_it_was)
    start(model)  # nothing is left in the way
    fresh = start(get_peft_model(llama(), copy.deepcopy(config)))
    assert_same(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_write_residual(dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    original = llama().to(device, dtype)
    original.name_or_path = "org/base"
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}
    model = wrap(copy.deepcopy(original), use_rslora=True, **patterns)
    assert model.peft_config["default"].base_model_name_or_path == "org/base"
    scalings = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    initialise(model)
    train(model)
    expected, parameters, A_and_B = logits(model), dict(model.named_parameters()), trainable(model)
    starts = {
        name: tuple(side["default"].start.double() for side in (layer.lora_A, layer.lora_B))
        for name, layer in lora_layers(model).items()
    }
    filet.write_residual(model)

    unit = torch.finfo(dtype).eps / 2
    for name, (A0, minus_B0) in starts.items():
        W, written = (
            module.weight.detach().double()
            for module in (original.get_submodule(name), lora_layers(model)[name].get_base_layer())
        )
        change = scalings[name] * minus_B0 @ A0
        assert change.abs().max() > 0.1 * W.abs().max()
        # One rounding of W_res; where W has 32 bits, those of the product and the sum as well.
        roundings = 1 if dtype in (torch.bfloat16, torch.float16) else 8
        error = (written - (W + change)).abs() / (W.abs().max() + change.abs().max())
        assert error.max() <= roundings * unit * (1 + 1e-2), name
    assert (logits(model) - expected).abs().max() < max(60 * torch.finfo(dtype).eps, 2e-5)

    # It is an ordinary adapter of another base now.
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_same(trainable(model), A_and_B)
    assert not any(isinstance(module, StartedFactor) for module in model.modules())
    plain = wrap(llama(), use_rslora=True, **patterns)
    for name, layer in lora_layers(model).items():
        assert layer.r == lora_layers(plain)[name].r
        assert layer.scaling == lora_layers(plain)[name].scaling
    config = model.peft_config["default"]
    assert type(config) is LoraConfig and config.base_model_name_or_path is None
    assert model.get_base_model().name_or_path == ""
    train(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "filet.json").exists()
    assert "org/base" not in (tmp_path / "adapter_config.json").read_text()
    residual = copy.deepcopy(original)
    residual.load_state_dict(base_state(model))
    again = PeftModel.from_pretrained(residual, str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="'default' has no frozen half"):
        filet.write_residual(model)


def _shared() -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        model = wrap(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
        initialise(model)
    return model


def _with_another() -> PeftModel:
    model = initialised()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["down_proj"]))
    return model


def _merged() -> PeftModel:
    model = initialised()
    model.merge_adapter()
    return model


REFUSED: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "shared": (_shared, r"lm_head is shared \(.*embed_tokens.*; expected target_modules without"),
    "another adapter": (_with_another, r"down_proj also has the adapter 'other'.* deleted first"),
    "merged": (_merged, r"an adapter is merged into its weight; .*unmerge_adapter"),
    "plain": (lambda: wrap(llama()), r"'default' has no frozen half"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_write_residual_refuses_and_leaves_everything_as_it_was(why: str) -> None:
    make, message = REFUSED[why]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        filet.write_residual(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"adapter_name='none'; expected one of"):
        filet.write_residual(model, "none")


def test_write_residual_goes_on_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(modules_to_save=["lm_head"])
    expected = logits(model)
    with monkeypatch.context() as patch:
        failing = Failing(write.residual_weight_, 4, MemoryError("full"), after=False)
        patch.setattr(write, "residual_weight_", failing)
        with pytest.raises(MemoryError):
            filet.write_residual(model)
    left = [m for m in model.modules() if isinstance(m, StartedFactor)]
    assert len(left) == 2 * (8 - 3)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    filet.write_residual(model)
    assert not any(isinstance(m, StartedFactor) for m in model.modules())
    torch.testing.assert_close(logits(model), expected, **CLOSE)
