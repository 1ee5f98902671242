"""What PEFT does with adapters, done with one that FILet initialised: it is a LoRA of rank 2r."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import filet
from adapted import (
    CLOSE,
    TARGETS,
    assert_same,
    base_state,
    classifier,
    effective_weights,
    gpt2,
    initialise,
    initialised,
    llama,
    logits,
    lora_layers,
    start,
    train,
    trainable,
    trained,
    weight_of,
    wrap,
)
from filet.model.factors import StartedFactor

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


def of_the_base() -> Tensor:
    return logits(wrap(llama()))


def two() -> tuple[PeftModel, dict[str, Tensor]]:
    """An initialised adapter "default" and a plain one "other", trained, and what each computes."""
    model = initialised()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    found = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        train(model)
        found[name] = logits(model)
    assert all((value - of_the_base()).abs().max() > 0.1 for value in found.values())
    return model, found


# Switching.


def _disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model), of_the_base())


def _off_and_on(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), of_the_base())
    model.base_model.enable_adapter_layers()


def _scaled_to_nothing(model: PeftModel) -> None:
    with rescale_adapter_scale(model, 0):
        assert_close(logits(model), of_the_base())


HABITS: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "set_adapter of a list": lambda model: model.base_model.set_adapter(["default"]),
    "disable_adapter": _disabled,
    "layers off and on": _off_and_on,
    "set_requires_grad": lambda model: model.set_requires_grad("default", True),
    "merge_adapter": lambda model: (model.merge_adapter(safe_merge=True), model.unmerge_adapter()),
    "rescale_adapter_scale": _scaled_to_nothing,
    "train and eval": lambda model: (model.eval(), model.train()),
    "status": lambda model: (model.get_model_status(), model.get_layer_status()),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_change_neither_the_function_nor_what_trains(habit: str) -> None:
    model, twin = trained(), trained()
    before, flags = trainable(model), {n: p.requires_grad for n, p in model.named_parameters()}
    HABITS[habit](model)
    assert_same(trainable(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    tolerance = CLOSE if habit == "merge_adapter" else {}  # which rounds W twice
    torch.testing.assert_close(logits(model), logits(twin), **tolerance or {"rtol": 0, "atol": 0})
    if not tolerance:
        assert_same(base_state(model), base_state(llama()))
        train(model)
        train(twin)
        assert_same(trainable(model), trainable(twin))


def test_another_adapter_takes_turns_with_it() -> None:
    model, expected = two()
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert torch.equal(logits(model), expected[name])
    assert_same(base_state(model), base_state(llama()))


def test_initialising_an_inactive_adapter_leaves_the_active_one_active() -> None:
    model = wrap(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    initialise(model, "other")
    assert model.active_adapters == ["default"]
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), of_the_base())
    model.set_adapter("other")
    assert_close(logits(model), of_the_base())
    assert (logits(model) - of_the_base()).abs().max() > 0  # it is on


def test_what_asks_for_gradients_is_the_users_choice() -> None:
    model = wrap(llama())
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "norm" in name:  # LoRA-FA, and norms trained along
            parameter.requires_grad_("norm" in name)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    for _ in range(2):  # also over an initialised one
        start(model)
        assert {key: p.requires_grad for key, p in model.named_parameters()} == flags


# Merging.


CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}


@pytest.mark.parametrize(
    ("make", "lora"),
    [(llama, {"rank_pattern": {"q_proj": 2}}), (gpt2, CONV1D), (classifier, {"task_type": None})],
)
def test_merge_and_unload(make: Callable[[], Any], lora: dict[str, Any]) -> None:
    model = trained(make=make, **lora)
    expected, weights = logits(model), effective_weights(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, (LoraLayer, StartedFactor)) for m in merged.modules())
    for name, weight in weights.items():
        torch.testing.assert_close(weight_of(merged.get_submodule(name)), weight, rtol=0, atol=2e-6)
    assert_close(logits(merged), expected)


def test_one_of_two_adapters_is_merged() -> None:
    model, expected = two()
    for name in ("default", "other"):
        model.merge_adapter([name])
        assert_close(logits(model), expected[name])
        model.unmerge_adapter()
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        assert_close(logits(merged), expected[name])
    model.merge_adapter(["default", "other"])
    base_model = model.base_model
    both = logits(model)
    model.unmerge_adapter()
    base_model.set_adapter(["default", "other"])
    assert_close(logits(model), both)
    assert_same(base_state(model), base_state(llama()), rtol=0, atol=1e-5)


def test_unload_gives_the_base_back() -> None:
    unloaded = trained().unload()
    assert_same(unloaded.state_dict(), llama().state_dict())
    assert torch.equal(logits(unloaded), of_the_base())


# Mixing.


def test_batches_of_several_adapters() -> None:
    model, expected = two()
    model.eval()
    names = ["default", "__base__", "other", "default"]
    of = expected | {"__base__": of_the_base()}
    found = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(found[row], of[name][row])


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_adapters(kind: str, tmp_path: Path) -> None:
    model, expected = two()
    model.add_weighted_adapter(["default"], [1.0], "alone", combination_type=kind)
    model.set_adapter("alone")
    torch.testing.assert_close(logits(model), expected["default"], rtol=1e-4, atol=1e-4)
    for layer in lora_layers(model).values():
        assert layer.r["alone"] == 8 and type(layer.lora_A["alone"]) is nn.Linear
    if kind == "cat":  # "linear" takes adapters of one rank; before 0.21 the svd of two was wrong
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type=kind)
        model.base_model.set_adapter(["default", "other"])
        both = logits(model)
        model.set_adapter("both")
        torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected["default"])

    # The new one is a plain adapter, also on disk.
    model.save_pretrained(tmp_path, selected_adapters=["alone"])
    assert not list(tmp_path.rglob("filet.json"))
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "alone"))
    torch.testing.assert_close(logits(plain), expected["default"], rtol=1e-4, atol=1e-4)
    filet.save_as_lora(model, tmp_path / "new", "alone")
    assert not (tmp_path / "new" / "filet.json").exists()
    assert torch.equal(logits(filet.load(llama(), tmp_path / "new")), logits(plain))


# Deleting and adding.


def test_deleting_leaves_nothing(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not any(".default" in name for name in model.state_dict())
    assert not any(isinstance(module, StartedFactor) for module in model.modules())
    assert_same(base_state(model), base_state(llama()))
    assert torch.equal(logits(model), of_the_base())

    # The name is free for another one, of another rank.
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"])
    model.add_adapter("default", config)
    model.set_adapter("default")
    start(model)
    train(model)
    expected = logits(model)
    filet.save_as_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (6, 18)
    layers = json.loads((tmp_path / "filet.json").read_text())["layers"]
    assert {layer["rank"] for layer in layers.values()} == {3} and len(layers) == 4
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path))), expected)
    assert torch.equal(logits(filet.load(llama(), tmp_path)), expected)


def test_its_plain_form_beside_it(tmp_path: Path) -> None:
    model = trained()
    expected = logits(model)
    filet.save_as_lora(model, tmp_path)
    model.load_adapter(str(tmp_path), "saved")
    model.set_adapter("saved")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    train(model)
    assert (logits(model) - expected).abs().max() > 0.1
    model.set_adapter("saved")
    assert torch.equal(logits(model), expected)


def test_hot_swapping(tmp_path: Path) -> None:
    """Into the initialised adapter, which then goes on from there, and into what plain PEFT has."""
    first, second = trained(), start(wrap(llama()), select="max")
    train(second)
    filet.save_as_lora(first, tmp_path / "first")
    filet.save_as_lora(second, tmp_path / "second")
    served = PeftModel.from_pretrained(llama(), str(tmp_path / "first"))
    for model in (first, served):
        hotswap_adapter(model, str(tmp_path / "second"), "default")
        assert torch.equal(logits(model), logits(second))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


# Saves.


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_gathered_by_parameter_names(rank: int, safe: bool, tmp_path: Path) -> None:
    """Many training scripts save so. What they give lacks the frozen halves."""
    model = trained(r=rank)
    gathered = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    model.save_pretrained(tmp_path, state_dict=gathered, safe_serialization=safe)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(filet.load(llama(), tmp_path)), logits(model))


def test_the_difference_to_another_adapter(tmp_path: Path) -> None:
    """Of another rank: a plain LoRA, and the folder says nothing else."""
    model = initialised()
    model.save_pretrained(tmp_path / "first")
    train(model)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(
        tmp_path / "both", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    assert not (tmp_path / "both" / "filet.json").exists()
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "both"))
    assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_save_under_a_scale_of_the_moment(rslora: bool, tmp_path: Path) -> None:
    model = trained(use_rslora=rslora)
    expected = logits(model)
    with rescale_adapter_scale(model, 0.5):
        scaled = logits(model)
        filet.save_as_lora(model, tmp_path / "scaled")
    assert (scaled - expected).abs().max() > 0.3
    model.save_pretrained(tmp_path / "as it is")
    for folder, right in (("scaled", scaled), ("as it is", expected)):
        for again in (
            PeftModel.from_pretrained(llama(), str(tmp_path / folder)),
            filet.load(llama(), tmp_path / folder),
        ):
            assert_close(logits(again), right)


def test_prepared_for_a_compiled_hot_swap(tmp_path: Path) -> None:
    """PEFT makes scalings tensors; with a larger rank it makes the factors plain ones of that."""
    model = trained()
    expected = logits(model)
    prepare_model_for_compiled_hotswap(model)
    filet.save_as_lora(model, tmp_path)
    assert_close(logits(filet.load(llama(), tmp_path)), expected)
    model = trained()
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    assert_close(logits(model), expected)
    assert not any(isinstance(module, StartedFactor) for module in model.modules())
    model.save_pretrained(tmp_path / "padded")
    assert not (tmp_path / "padded" / "filet.json").exists()


def test_a_save_that_lacks_a_factor(tmp_path: Path) -> None:
    """As PEFT writes it. Nothing says that it has all."""
    model = trained()
    state = model.state_dict()
    del state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "filet.json").exists()


# Adapters made by the config of one that is initialised.


def _reference(model: PeftModel, config: LoraConfig) -> None:
    """What TRL's trainers do for a reference: another adapter, and its parameters by name."""
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("copied", [False, True])
def test_a_reference_as_trl_makes_it(rank: int, copied: bool, tmp_path: Path) -> None:
    model = wrap(llama(), r=rank)
    original = logits(model)
    initialise(model)
    train(model)
    expected = logits(model)
    config = model.peft_config["default"]
    _reference(model, copy.deepcopy(config) if copied else config)
    train(model)
    after = logits(model)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (expected - original).abs().max() > 0.3 and (after - expected).abs().max() > 0.3
    filet.save_as_lora(model, tmp_path, "ref")
    model.save_pretrained(tmp_path / "all")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), after, **CLOSE)
    for folder in (tmp_path, tmp_path / "all" / "ref"):
        plain = PeftModel.from_pretrained(llama(), str(folder))
        torch.testing.assert_close(logits(plain), expected, **CLOSE)
        torch.testing.assert_close(logits(filet.load(llama(), folder)), expected, **CLOSE)


def test_a_reference_begins_where_the_policy_did() -> None:
    model = trained()
    original = logits(llama())
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), original, **CLOSE)


def test_another_model_by_that_config_is_plain(tmp_path: Path) -> None:
    """Its layers know no start, and no file says that they had one."""
    config = trained().peft_config["default"]
    model = get_peft_model(llama(), config)
    assert not any(isinstance(module, StartedFactor) for module in model.modules())
    train(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "filet.json").exists()
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(plain), logits(model))


# Configs.


def test_the_users_config_stays_as_it_is() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 2}
    )
    model = get_peft_model(llama(), config)
    assert model.peft_config["default"] is config
    before = copy.deepcopy(vars(config))
    start(model)
    assert type(config) is LoraConfig and vars(config) == before
    assert (config.r, config.rank_pattern) == (4, {"q_proj": 2})
    again = get_peft_model(llama(), config)
    assert {layer.r["default"] for layer in lora_layers(again).values()} == {2, 4}
    assert not any(isinstance(module, StartedFactor) for module in again.modules())
    with pytest.raises(ValueError, match="has no frozen half"):
        filet.write_residual(again)


def test_a_scaling_that_was_set_by_hand(tmp_path: Path) -> None:
    model = wrap(llama())
    for layer in lora_layers(model).values():
        layer.set_scale("default", 0.5)
    start(model)
    assert_close(logits(model), of_the_base())
    train(model)
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(plain), logits(model))
    for layer in lora_layers(model).values():  # and once more, of what was initialised
        layer.scale_layer(0.25)
    filet.save_as_lora(model, tmp_path / "again")
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "again"))
    assert torch.equal(logits(plain), logits(model))
    assert {layer.scaling["default"] for layer in lora_layers(plain).values()} == {0.25}
