"""The start at B = 0: plain LoRA with chosen rows of A, and nothing else about it.

The other start, with a frozen half, is what most files of tests are about.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

import filet
import finetune
from adapted import TARGETS, assert_same, initialise, llama, logits, lora_layers, start, train, wrap
from adapter_cases import CASES, Failing, assert_unchanged, base_of, contents, snapshot
from filet.adapter import write
from filet.model.factors import StartedFactor
from initialised import LOUD
from oldest_peft import needs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

ZERO: dict[str, Any] = {"start": "zero", "normalization": "relative", "scaling": "fisher"}


def known(model: PeftModel) -> dict[str, Any]:
    """All that PEFT knows of the layers and the adapter."""
    found = snapshot(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    return {"kinds": kinds} | {
        key: found[key] for key in ("flags", "sizes", "attributes", "configs", "active", "layers")
    }


@pytest.mark.parametrize("case", CASES)
def test_it_is_plain_lora(case: str, tmp_path: Path) -> None:
    """To PEFT all is as it made it, but for the values; the function is the base's to the bit."""
    base = base_of(case)
    model, fresh = (wrap(copy.deepcopy(base), **CASES[case]) for _ in range(2))
    if case == "bias lora_only":
        needs("0.21", "loses these biases in its own saves")
    config = model.peft_config["default"]
    before, shapes = known(model), {k: v.shape for k, v in fresh.state_dict().items()}
    initialise(model, **ZERO)
    assert model.peft_config["default"] is config
    assert known(model) == before == known(fresh)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    chosen = [x for x in lora_layers(model).values() if isinstance(x, lora.Linear)]
    for layer in chosen:
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert type(layer) is lora.Linear and type(A) is type(B) is nn.Linear
        assert A.weight.any(1).all()
        assert not any(p.any() for p in B.parameters())
    assert chosen
    assert torch.equal(logits(model), logits(base))

    train(model)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-3
    filet.save_as_lora(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "peft")
    assert contents(tmp_path / "ours").keys() == contents(tmp_path / "peft").keys() - {"README.md"}
    for folder in (tmp_path / "ours", tmp_path / "peft"):
        assert not (folder / "filet.json").exists()
        plain = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
        loaded = filet.load(copy.deepcopy(base), folder)
        for again in (plain, loaded):
            assert_same(again.state_dict(), model.state_dict())
            assert torch.equal(logits(again), expected)
        assert known(loaded)["flags"] == known(model)["flags"]


@pytest.mark.parametrize("init", [False, "gaussian", "eva"])
def test_another_initialisation_is_not_in_the_config_any_more(init: Any) -> None:
    given = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), given)
    before = copy.deepcopy(vars(given))
    start(model, **ZERO)
    assert vars(given) == before
    config = model.peft_config["default"]
    assert type(config) is LoraConfig and config.init_lora_weights is True
    plain = {**vars(given), "init_lora_weights": True, "eva_config": None}
    assert vars(config) == plain
    for layer in lora_layers(model).values():
        assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns rslora", "rslora lora_bias"])
def test_each_start_leaves_no_trace_of_the_other(case: str, tmp_path: Path) -> None:
    def of(*starts: dict[str, Any]) -> PeftModel:
        model = wrap(base_of(case), **CASES[case])
        for settings in starts:
            initialise(model, **settings)
            train(model)
        initialise(model, **starts[0])
        return model

    for one, other in ((ZERO, LOUD), (LOUD, ZERO)):
        again, fresh = of(one, other), of(one)
        assert_same(again.state_dict(), fresh.state_dict())
        assert known(again) == known(fresh)
        # The folder that had the other's files has nothing of it either.
        turned = wrap(base_of(case), **CASES[case])
        for settings in (other, one):
            initialise(turned, **settings)
            train(turned)
            filet.save_as_lora(turned, tmp_path / "turned")
        straight = wrap(base_of(case), **CASES[case])
        initialise(straight, **one)
        train(straight)
        filet.save_as_lora(straight, tmp_path / "straight")
        assert contents(tmp_path / "turned") == contents(tmp_path / "straight")
        loaded = filet.load(base_of(case), tmp_path / "turned")
        assert torch.equal(logits(loaded), logits(turned))


def test_zero_after_a_folder_that_was_untouched(tmp_path: Path) -> None:
    """Nobody knows the first config any more: this one says the same by the layers' names."""
    first = wrap(llama(), use_rslora=True, r=3, rank_pattern={"q_proj": 2})
    start(first)
    filet.save_as_lora(first, tmp_path / "first")
    model = filet.load(llama(), tmp_path / "first")
    start(model, **ZERO)
    fresh = start(wrap(llama(), use_rslora=True, r=3, rank_pattern={"q_proj": 2}), **ZERO)
    assert_same(model.state_dict(), fresh.state_dict())
    train(model)
    model.save_pretrained(tmp_path / "then")
    config = json.loads((tmp_path / "then" / "adapter_config.json").read_text())
    assert config["r"] == 3 and set(config["rank_pattern"].values()) == {2}
    for again in (
        PeftModel.from_pretrained(llama(), str(tmp_path / "then")),
        filet.load(llama(), tmp_path / "then"),
    ):
        assert torch.equal(logits(again), logits(model))
        for name, layer in lora_layers(again).items():
            scaling = lora_layers(fresh)[name].scaling["default"]
            assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12)


def test_a_scaling_that_was_set_by_hand_is_saved(tmp_path: Path) -> None:
    model = wrap(llama(), use_rslora=True)
    for layer in lora_layers(model).values():
        layer.set_scale("default", 0.5)
    start(model, **ZERO)
    train(model)
    config = copy.deepcopy(vars(model.peft_config["default"]))
    for scale in (1.0, 0.25):
        for layer in lora_layers(model).values():
            layer.scale_layer(scale)
        filet.save_as_lora(model, tmp_path)
        plain = PeftModel.from_pretrained(llama(), str(tmp_path))
        assert torch.equal(logits(plain), logits(model))
    assert vars(model.peft_config["default"]) == config


def test_there_is_no_residual_to_write() -> None:
    model = start(wrap(llama()), **ZERO)
    model.add_adapter("paper", LoraConfig(r=2, target_modules=["up_proj"]))
    start(model, "paper")
    before = snapshot(model)
    message = (
        r"^adapter 'default' has no frozen half, so there is no residual to write; expected one "
        r"that FILet initialised with start='untouched', of \['paper'\]$"
    )
    with pytest.raises(ValueError, match=message):
        filet.write_residual(model)
    assert_unchanged(model, before)


def test_beside_one_with_a_frozen_half() -> None:
    """On the same layers: each keeps what it is, whichever is initialised last."""
    model = start(wrap(llama()))
    model.add_adapter("zero", LoraConfig(r=3, target_modules=TARGETS))
    start(model, "zero", **ZERO)
    original = logits(llama())
    for name in ("default", "zero"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), original, rtol=2e-5, atol=2e-5)
    for layer in lora_layers(model).values():
        assert isinstance(layer.lora_A["default"], StartedFactor)
        assert type(layer.lora_A["zero"]) is nn.Linear
        assert layer.r == {"default": 8, "zero": 3}
    start(model, "default", **ZERO)
    assert all(type(layer) is lora.Linear for layer in lora_layers(model).values())


def test_values_on_the_meta_device_become_real() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS), low_cpu_mem_usage=True)
    start(model, **ZERO)
    assert all(p.device.type == "cpu" for p in model.parameters())
    fresh = start(get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS)), **ZERO)
    assert_same(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("settings", [ZERO, LOUD], ids=["zero", "untouched"])
def test_the_demo_compares_equal_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of what trains, by each of its methods; and equal scalings."""
    filet.save_as_lora(start(wrap(llama(), r=3, lora_alpha=6), **settings), tmp_path)
    for method, make in finetune.methods(llama, {"FILet": tmp_path}).items():
        model = make()
        ranks = {len(p) for n, p in model.named_parameters() if ".lora_A." in n}
        scalings = {layer.scaling["default"] for layer in lora_layers(model).values()}
        assert (ranks, scalings) == ({3}, {2.0}), method


PLACES = {
    "the first factor": ("_write", 1),
    "a bias": ("_write", 4),
    "a factor": ("_write", 7),
    "a half taken off": ("end", 5),
    "a rank": ("set_rank", 3),
    "the config": ("describe", 1),
}


@pytest.mark.parametrize(
    ("error", "after"), [(MemoryError("full"), False), (KeyboardInterrupt(), True)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("before", ["plain", "untouched"])
def test_an_exception_leaves_everything_as_it_was(
    before: str,
    place: str,
    error: BaseException,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, k = PLACES[place]
    if name in ("set_rank", "end") and before == "plain":  # PEFT has that right
        name, k = "_settle", 3
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_bias=True, use_rslora=True)
    model = get_peft_model(llama(), config)
    if before == "untouched":
        start(model, select="max")
    train(model)
    as_it_was = snapshot(model)
    owner = StartedFactor if name == "end" else write
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Failing(getattr(owner, name), k, error, after))
        with pytest.raises(type(error)):
            start(model, **ZERO)
    assert_unchanged(model, as_it_was)
    start(model, **ZERO)  # nothing is left in the way
    fresh = start(get_peft_model(llama(), copy.deepcopy(config)), **ZERO)
    assert_same(model.state_dict(), fresh.state_dict())
    assert known(model) == known(fresh)
