"""What is not initialised: modules that keep the default, and models that are refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from filet import FiletConfig, apply_statistics, collect_statistics, estimate
from initialised import (
    LOUD,
    assert_bitwise,
    initialized,
    layer_of,
    logits_of,
    never,
    warnings_of,
    weights,
)
from models import (
    RANK,
    Case,
    assert_energies,
    case,
    collate,
    llama,
    loader,
    mean_and_terms,
    peft_of,
    true_energies,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# What cannot be initialised.


@pytest.mark.parametrize("meta", [False, True])
def test_expert_that_saw_no_token(meta: bool) -> None:
    c = case("experts")
    model = copy.deepcopy(c.model)
    lora = LoraConfig(r=RANK, target_modules=c.targets)
    peft_model = get_peft_model(model, lora, low_cpu_mem_usage=meta)
    report, said = warnings_of(peft_model, loader(c.samples, 1), **LOUD)
    unseen = ["experts.3.0", "experts.3.2"]
    assert len(said) == 1 and all(f"{name} (it saw no token)" in said[0] for name in unseen)
    assert sorted(report.left_default) == unseen
    assert sorted(report.modules) == sorted(set(c.targets) - set(unseen))
    for name in unseen:
        layer = layer_of(peft_model, name)
        assert torch.equal(layer.get_base_layer().weight, weight_of(c.model, name))
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.abs().sum() > 0 and not B.any()  # PEFT's default
    with torch.no_grad():  # also what the unseen expert computes
        batch = {"input_ids": torch.arange(12).view(1, -1), "labels": torch.arange(12).view(1, -1)}
        ours, theirs = peft_model(**batch).logits, c.model(**batch).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_module_that_the_loss_does_not_reach() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(case("perceptron").model)
            self.aside = nn.Linear(29, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids)
            self.aside(logits)
            return logits

    peft_model = get_peft_model(Side(), LoraConfig(r=2, target_modules=["up", "aside"]))
    samples = loader(case("perceptron").samples)
    report, said = warnings_of(peft_model, samples, forward_fn=mean_and_terms)
    assert report.left_default == {"aside": "no gradient reached it"}
    assert len(said) == 1 and "aside (no gradient reached it)" in said[0]


def test_no_module_saw_anything() -> None:
    c = case("experts")
    peft_model = peft_of(Case(c.model, c.samples, ["experts.3.0"]))
    before = weights(peft_model)
    with pytest.raises((ValueError, RuntimeError), match=r"no (target )?module"):
        initialized(peft_model, loader(c.samples, 1))
    assert_bitwise(peft_model, before)


def test_embedding_is_named_in_one_warning() -> None:
    c = case("llama")
    targets = [*c.targets, "embed_tokens"]
    peft_model = peft_of(Case(c.model, c.samples, targets))
    before = logits_of(peft_model)
    report, said = warnings_of(peft_model, **LOUD)
    assert list(report.left_default) == ["model.embed_tokens"]
    assert len(said) == 1 and "model.embed_tokens (Embedding is not a linear module" in said[0]
    assert torch.allclose(logits_of(peft_model), before, atol=1e-4)


def test_convolution_is_named_in_one_warning() -> None:
    c = case("vit")
    peft_model = peft_of(Case(c.model, c.samples, [*c.targets, "projection"]))
    report, said = warnings_of(peft_model, loader(c.samples))
    (name,) = report.left_default
    assert name.endswith("projection") and len(said) == 1 and f"{name} (Conv2d" in said[0]
    assert sorted(report.modules) == sorted(c.targets)


def test_nothing_to_initialise() -> None:
    c = case("llama")
    peft_model = peft_of(Case(c.model, c.samples, ["embed_tokens"]))
    with pytest.raises(ValueError, match=r"no module that FILet can initialise.*embed_tokens"):
        initialized(peft_model, never())


def test_dora_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"q_proj and 13 more: its adapter is a Dora\w+, not"):
        initialized(peft_of(case("llama"), use_dora=True), never())


# Refusals, all before the data are read.


def test_not_a_lora_model() -> None:
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*get_peft_model"):
        initialized(case("llama").model, never())
    with pytest.raises(ValueError, match=r"adapter_name='other'; expected one of \['default'\]"):
        initialized(peft_of(case("llama")), never(), adapter_name="other")


def test_other_tuner_is_refused() -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft_model = get_peft_model(copy.deepcopy(case("llama").model), config)
    with pytest.raises(ValueError, match=r"IA3.*expected a LoRA adapter"):
        initialized(peft_model, never())


def test_merged_adapter_is_refused() -> None:
    peft_model = peft_of(case("llama"))
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: an adapter is merged.*unmerge_adapter"):
        initialized(peft_model, never())
    peft_model.unmerge_adapter()
    initialized(peft_model)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "corda", "olora", "OLoRA", "loftq", "lora_ga"]
)
def test_a_changed_base_is_refused_by_name(init: str) -> None:
    c = case("llama")
    statistics = collect_statistics(
        peft_of(c), loader(c.samples[:4]), FiletConfig(samples=None), show_progress_bar=False
    )
    for adapter in ("default", "other"):
        peft_model = peft_of(c)
        peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
        # As if it had been made with it: most need data, or bitsandbytes.
        peft_model.peft_config[adapter].init_lora_weights = init
        before = weights(peft_model)
        match = (
            rf"adapter '{adapter}' has init_lora_weights='{init}', by which PEFT changes the base "
            "weights; expected the original ones"
        )
        with pytest.raises(ValueError, match=match):
            initialized(peft_model, never())
        with pytest.raises(ValueError, match=match):
            collect_statistics(peft_model, never())
        with pytest.raises(ValueError, match=match):
            estimate(peft_model, collate(c.samples))
        with pytest.raises(ValueError, match=match):
            apply_statistics(peft_model, statistics)
        assert_bitwise(peft_model, before)


def test_a_changed_base_on_other_layers_is_none_of_its_business() -> None:
    c = case("llama")
    pissa = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights="pissa")
    for target, taken in (("up_proj", False), ("q_proj", True)):
        peft_model = peft_of(Case(c.model, c.samples, [target]))
        peft_model.add_adapter("other", pissa)
        name = "model.layers.0.mlp.up_proj"
        changed = layer_of(peft_model, name).get_base_layer().weight
        assert (changed - weight_of(c.model, name)).abs().max() > 1e-2
        if taken:
            initialized(peft_model)
        else:
            with pytest.raises(ValueError, match="adapter 'other' has init_lora_weights='pissa'"):
                initialized(peft_model, never())


def test_inits_that_keep_the_base_are_taken() -> None:
    for init in (False, "gaussian", "orthogonal"):
        peft_model = peft_of(case("llama"), init_lora_weights=init)
        report = initialized(peft_model)
        assert len(report.modules) == 14
        assert peft_model.peft_config["default"].init_lora_weights is True


def test_rank_above_candidates_is_refused() -> None:
    peft_model = peft_of(case("llama"), rank_pattern={"layers.1.mlp.gate_proj": 33})
    before = weights(peft_model)
    with pytest.raises(ValueError, match=r"1\.mlp\.gate_proj: rank 33 exceeds its 32 candidate"):
        initialized(peft_model, never())
    assert_bitwise(peft_model, before)


def test_zero_columns_are_never_chosen() -> None:
    model = llama(layers=1)
    name = "model.layers.0.mlp.down_proj"
    zero = torch.arange(48) % 4 == 1
    with torch.no_grad():
        model.get_submodule(name).weight[:, zero] = 0
    c = Case(model, case("llama").samples, [name], True)
    expected = true_energies(model, [name], c.samples, True)[name]
    assert expected[zero].isnan().all()
    for select in ("min", "max", "random"):
        module = initialized(peft_of(c, r=36), select=select).modules[name]
        assert module.energies.isnan().equal(zero)
        assert not zero[module.indices].any()
        assert module.indices.sort().values.equal((~zero).nonzero().squeeze(1))
    assert_energies({name: module.energies[~zero]}, {name: expected[~zero]}, 1e-4)
    with pytest.raises(ValueError, match="rank 37 exceeds its 36 candidate"):
        initialized(peft_of(c, r=37), never())


def test_tied_weight() -> None:
    """A head that is the embedding too: nothing is written into either."""
    model = llama(layers=1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    c = Case(model, case("llama").samples, ["q_proj", "lm_head"], True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        peft_model = peft_of(c)
    before = logits_of(peft_model)
    report = initialized(peft_model, **LOUD)
    assert list(report.modules) == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert torch.allclose(logits_of(peft_model), before, atol=1e-4)
    assert torch.equal(layer_of(peft_model, "lm_head").weight, model.lm_head.weight)


def test_quantised_or_unloaded_bases_are_refused() -> None:
    peft_model = peft_of(case("llama"))
    layer_of(peft_model, "model.layers.0.self_attn.q_proj").base_layer.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        initialized(peft_model, never())
