"""The pass sees the model as its training begins, and leaves it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import oracle
from models import (
    Case,
    assert_energies,
    case,
    energies_of,
    loader,
    mean_and_terms,
    observe,
    peft_of,
    truth,
    weight_of,
    worst,
)
from passes import (
    FLOAT32,
    assert_unchanged,
    draws,
    hooked,
    nothing,
    randomise,
    snapshot,
    statistics_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# The model comes back as it was.


@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "probe", "loss"])
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_state_is_restored(kind: str, how: str, device: torch.device) -> None:
    c = case(kind)
    dtype = torch.float16 if how == "probe" else torch.float32
    peft_model = peft_of(c, device, dtype)
    base = peft_model.base_model.model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modules = list(peft_model.modules())
    for index, module in enumerate(modules):
        module.training = index % 3 != 0
    trained = hooked(peft_model, c.targets[0])
    trained.base_layer.weight.requires_grad_(True)  # someone trains a base weight as well
    for parameter in (trained.base_layer.weight, trained.lora_A["default"].weight):
        parameter.grad = torch.randn_like(parameter)
    base.config.use_cache = True
    before = snapshot(peft_model)
    calls = []

    def forward_fn(model: Any, batch: Any) -> Any:
        calls.append(0)
        draws(model)
        if how == "exception" and len(calls) == 2:
            raise ZeroDivisionError
        output = model(**batch)
        if how == "loss":
            return output.loss * 2, None
        return output.loss * torch.nan if how == "probe" else output

    def batches() -> Iterator[Any]:
        for index, batch in enumerate(loader(c.samples)):
            if how == "interrupt" and index == 2:
                raise KeyboardInterrupt
            yield batch

    expected: dict[str, type[BaseException]] = {
        "exception": ZeroDivisionError,
        "interrupt": KeyboardInterrupt,
        "probe": FloatingPointError,
        "loss": ValueError,
    }
    with pytest.raises(expected[how]) if how in expected else nothing():
        statistics_of(peft_model, batches(), forward_fn, loss_reduction="mean")
    assert_unchanged(peft_model, before)


def test_what_is_initialised_is_off_in_the_pass() -> None:
    c = case("llama")
    peft_model = peft_of(c)
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model.set_adapter("other")
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)  # were they on, the energies would be others
    active = list(peft_model.active_adapters)
    assert_energies(energies_of(peft_model, loader(c.samples)), truth("llama"), FLOAT32)
    assert list(peft_model.active_adapters) == active == ["other"]
    assert peft_model.get_model_status().enabled is True
    peft_model.base_model.disable_adapter_layers()
    before = snapshot(peft_model)
    assert_energies(energies_of(peft_model, loader(c.samples)), truth("llama"), FLOAT32)
    assert_unchanged(peft_model, before)
    assert peft_model.get_model_status().enabled is False


# The pass sees the model as the adapter's training will begin.


def energies_in(seen_in: nn.Module, c: Case) -> dict[str, Tensor]:
    """Energies of the case's own weights, where x and g are those of another model."""
    seen, terms = observe(seen_in, c.targets, c.samples, c.shift)
    return {
        name: oracle.fisher_energies(weight_of(c.model, name), x, g) / terms**2
        for name, (x, g) in seen.items()
    }


def without(kind: str, *names: str) -> Case:
    c = case(kind)
    return Case(c.model, c.samples, [t for t in c.targets if t not in names], c.shift)


def _head(name: str, adapter: str = "default") -> Callable[[PeftModel, nn.Module], None]:
    def put(peft_model: PeftModel, model: nn.Module) -> None:
        wrapper: Any = hooked(peft_model, name)
        model.get_submodule(name).load_state_dict(wrapper.modules_to_save[adapter].state_dict())

    return put


@torch.no_grad()
def _tokens(peft_model: PeftModel, model: Any) -> None:
    trained: Any = hooked(peft_model, "model.embed_tokens.token_adapter")
    model.model.embed_tokens.weight[[3, 7]] = trained.trainable_tokens_delta["default"]


@torch.no_grad()
def _embedding(peft_model: PeftModel, model: Any) -> None:
    layer: Any = hooked(peft_model, "model.embed_tokens")
    A, B = (x["default"] for x in (layer.lora_embedding_A, layer.lora_embedding_B))
    model.model.embed_tokens.weight += layer.scaling["default"] * (B @ A).T


# What was trained before: model, LoRA's settings, names of its parameters, into a plain model.
TRAINED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Any]] = {
    "head": ("llama", {"modules_to_save": ["lm_head"]}, ("modules_to_save",), _head("lm_head")),
    "classifier": (
        "bert class",
        {"modules_to_save": ["classifier"]},
        ("modules_to_save",),
        _head("classifier"),
    ),
    "tokens": ("llama", {"trainable_token_indices": [3, 7]}, ("tokens_delta",), _tokens),
    "embedding": ("llama", {}, ("lora_embedding",), _embedding),
}


@pytest.mark.parametrize("what", TRAINED)
def test_what_was_trained_before_is_part_of_the_function(what: str, device: torch.device) -> None:
    kind, lora, parts, put = TRAINED[what]
    c = without(kind, "classifier")
    targets = [*c.targets, "embed_tokens"] if what == "embedding" else c.targets
    peft_model = peft_of(Case(c.model, c.samples, targets), target_modules=targets, **lora)
    randomise(peft_model, "lora_", *parts)  # of the targets as well, whose adapter is off
    trained = copy.deepcopy(c.model)
    put(peft_model, trained)
    expected = energies_in(trained, c)
    assert worst(expected, energies_in(c.model, c))[0] > 0.05
    assert_energies(energies_of(peft_model.to(device), loader(c.samples)), expected, FLOAT32)


def two_adapters(lora: dict[str, Any], **other: Any) -> PeftModel:
    peft_model = peft_of(case("llama"), **lora)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], **other}
    peft_model.add_adapter("other", LoraConfig(**settings))
    randomise(peft_model, "lora_", "modules_to_save")
    return peft_model


def test_another_active_adapter_is_part_of_the_function() -> None:
    c = case("llama")
    peft_model = two_adapters({})
    merged = copy.deepcopy(c.model)
    with torch.no_grad():
        for name in c.targets:
            layer: Any = hooked(peft_model, name)
            if "other" in layer.lora_A:
                merged.get_submodule(name).weight += layer.get_delta_weight("other")
    expected = energies_in(merged, c)
    assert worst(expected, truth("llama"))[0] > 0.05
    peft_model.base_model.set_adapter(["default", "other"])
    assert_energies(energies_of(peft_model, loader(c.samples)), expected, FLOAT32)
    peft_model.base_model.set_adapter(["other", "default"])
    peft_model.base_model.disable_adapter_layers()  # training will enable them
    assert_energies(energies_of(peft_model, loader(c.samples)), expected, FLOAT32)


def test_an_inactive_adapter_is_taken_to_be_alone() -> None:
    """With the head that belongs to it, not that of the active one."""
    c = case("llama")
    heads = {"modules_to_save": ["lm_head"]}
    peft_model = two_adapters(heads, **heads)
    peft_model.set_adapter("other")
    trained = copy.deepcopy(c.model)
    _head("lm_head")(peft_model, trained)
    assert_energies(energies_of(peft_model, loader(c.samples)), energies_in(trained, c), FLOAT32)
    assert peft_model.active_adapters == ["other"]


def _inactive(peft_model: PeftModel) -> None:
    peft_model.set_adapter("other")


def _both(peft_model: PeftModel) -> None:
    peft_model.base_model.set_adapter(["other", "default"])


def _disabled(peft_model: PeftModel) -> None:
    peft_model.base_model.disable_adapter_layers()


def _frozen(peft_model: PeftModel) -> None:
    peft_model.requires_grad_(False)


@pytest.mark.parametrize("how", ["success", "exception", "interrupt"])
@pytest.mark.parametrize("switch", [_inactive, _both, _disabled, _frozen])
def test_switches_are_put_back(switch: Callable[[PeftModel], None], how: str) -> None:
    peft_model = two_adapters({"trainable_token_indices": [3]}, modules_to_save=["lm_head"])
    if switch is _both:  # PEFT has one module to save active at a time
        peft_model = two_adapters({"trainable_token_indices": [3]})
    switch(peft_model)
    before = snapshot(peft_model)

    def forward_fn(model: Any, batch: Any) -> Any:
        if how == "exception":
            raise ZeroDivisionError
        if how == "interrupt":
            raise KeyboardInterrupt
        return model(**batch)

    expected = {"exception": ZeroDivisionError, "interrupt": KeyboardInterrupt}
    with pytest.raises(expected[how]) if how in expected else nothing():
        statistics_of(peft_model, loader(case("llama").samples), forward_fn)
    assert_unchanged(peft_model, before)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_adds_nothing_is_not_run() -> None:
    """A fresh adapter of fused experts would copy all their weights."""
    c = case("llama")
    peft_model = peft_of(Case(c.model, c.samples, ["q_proj"]))
    up_and_down = ["up_proj", "down_proj"]
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=up_and_down, lora_bias=True))
    peft_model.base_model.set_adapter(["default", "other"])
    calls = []
    for name, module in peft_model.named_modules():
        if "lora_A." in name:
            module.register_forward_hook(lambda *_, n=name: calls.append(n))
    statistics_of(peft_model, loader(c.samples))
    assert calls == []
    factors: Any = [
        hooked(peft_model, f"model.layers.{i}.mlp.up_proj.lora_B.other") for i in (0, 1)
    ]
    nn.init.normal_(factors[0].weight)
    nn.init.normal_(factors[1].bias)
    statistics_of(peft_model, loader(c.samples))
    run = {f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.other" for i in (0, 1)}
    assert set(calls) == run


def test_inside_no_grad_and_inference_mode() -> None:
    c = case("llama")
    for mode in (torch.no_grad, torch.inference_mode):
        peft_model = peft_of(c)
        with mode():
            found = energies_of(peft_model, loader(c.samples))
        assert_energies(found, truth("llama"), FLOAT32)


def test_no_weight_gradient_is_computed() -> None:
    c = case("perceptron")
    peft_model = peft_of(c)
    asked: list[bool] = []

    def forward_fn(model: Any, batch: Any) -> Any:
        asked.extend(p.requires_grad for p in model.parameters())
        return mean_and_terms(model, batch)

    statistics_of(peft_model, loader(c.samples), forward_fn)
    assert asked and not any(asked)
