"""Adapters and statistics of quantised bases: saved, loaded, refused to others, merged, undone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from quantised_bases import (
    LIBRARIES,
    assert_stored,
    batches,
    dense,
    initialised,
    kinds,
    linears,
    logits,
    of_bits,
    peft_of,
    quantised,
    stored,
    trained,
    trainer_of,
    values,
)

import filet
from filet import FiletConfig, Statistics, apply_statistics, collect_statistics
from filet.initialize import initialize_folder
from filet.model.factors import StartedFactor
from filet.model.folder import quantization_of

# B0 A0 = W V̂ V̂ᵀ: a frozen half that were lost would change the logits by their own size.
LOUD = {"start": "untouched", "normalization": "mean", "orthogonal": False, "scaling": "singular"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FOUR_BIT = "nf4 (bitsandbytes)"


def trained_on(kind: str, **config: Any) -> PeftModel:
    peft_model = peft_of(quantised(kind))
    initialised(peft_model, **config)
    trained(peft_model.train(), rate=1e-3)
    return peft_model.eval()


def statistics_of(model: Any) -> Statistics:
    return collect_statistics(
        peft_of(model), batches(), FiletConfig(samples=None), show_progress_bar=False
    )


def layers(peft_model: Any) -> dict[str, LoraLayer]:
    return {n: m for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("config", [{}, LOUD], ids=["zero", "untouched"])
@pytest.mark.parametrize("kind", kinds())
def test_saved_and_loaded_on_a_freshly_quantised_base(
    kind: str, config: Any, tmp_path: Path
) -> None:
    peft_model = trained_on(kind, **config)
    expected = logits(peft_model)
    filet.save_as_lora(peft_model, tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "peft")
    for folder in ("ours", "peft"):
        loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, **CLOSE)
        again = filet.load(quantised(kind), tmp_path / folder).eval()
        torch.testing.assert_close(logits(again), expected, **CLOSE)
        factors = [m for m in again.modules() if isinstance(m, StartedFactor)]
        assert len(factors) == (2 * 8 if config else 0)
        assert {layer.r["default"] for layer in layers(again).values()} == {16 if config else 8}
        before = stored(again)
        losses = trained(again.train(), rate=1e-3)
        assert losses[-1] < losses[0]
        assert_stored(again, before)


@pytest.mark.parametrize("kind", kinds("nf4", "int8", "hqq", "torchao"))
def test_an_adapter_belongs_to_its_base(kind: str, tmp_path: Path) -> None:
    """Of a quantised base to no plain one, and the other way round, each said by name."""
    base = quantised(kind)
    name = next(iter(values(base).values())).kind
    plain = dense(base)
    for model, folder in ((base, "quantised"), (plain, "plain")):
        peft_model = peft_of(model)
        initialised(peft_model, **LOUD)
        filet.save_as_lora(peft_model, tmp_path / folder)
    other = dense(quantised(kind))
    with pytest.raises(ValueError) as refused:
        filet.load(other, tmp_path / "quantised")
    assert f"belongs to a base in {name}: the weight of " in str(refused.value)
    assert " is float32 in this model; expected" in str(refused.value)
    with pytest.raises(ValueError) as refused:
        filet.load(quantised(kind), tmp_path / "plain")
    assert "belongs to a base in float32: the weight of " in str(refused.value)
    assert f" is {name} in this model; expected" in str(refused.value)


@pytest.mark.parametrize("kind", kinds("nf4", "torchao"))
def test_statistics_belong_to_their_base(kind: str, tmp_path: Path) -> None:
    base = quantised(kind)
    name = next(iter(values(base).values())).kind
    taken, of_plain = statistics_of(quantised(kind)), statistics_of(dense(base))
    taken.save(tmp_path / "s.safetensors")
    report = apply_statistics(peft_of(quantised(kind)), Statistics.load(tmp_path / "s.safetensors"))
    assert len(report.modules) == 8
    with pytest.raises(ValueError, match="belong to a base in ") as refused:
        apply_statistics(peft_of(dense(base)), taken)
    assert name in str(refused.value) and "is float32 in this model" in str(refused.value)
    with pytest.raises(ValueError, match="belong to a base in float32") as refused:
        apply_statistics(peft_of(quantised(kind)), of_plain)
    assert f"is {name} in this model" in str(refused.value)
    with pytest.raises(ValueError, match="belong to a base in "):
        taken.merge(of_plain)


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_one_other_code_is_another_base(kind: str) -> None:
    taken = statistics_of(quantised(kind))
    base = quantised(kind)
    linears(base)["model.layers.1.mlp.down_proj"].weight.data.view(-1)[7] ^= 16
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is .*expected the very same"):
        apply_statistics(peft_of(base), taken)
    with pytest.raises(ValueError, match=r"base in nf4 \(bitsandbytes\).* is fp4 \(bitsandbytes\)"):
        apply_statistics(peft_of(quantised("fp4")), taken)


@pytest.mark.parametrize("kind", kinds("nf4", "hqq"))
def test_the_residual_is_not_written(kind: str) -> None:
    peft_model = peft_of(quantised(kind))
    initialised(peft_model, **LOUD)
    before, function = stored(peft_model), logits(peft_model)
    with pytest.raises(ValueError, match=r"is quantised \(.*its residual would be quantised anew"):
        filet.write_residual(peft_model)
    assert_stored(peft_model, before)
    assert torch.equal(logits(peft_model), function)


@pytest.mark.parametrize("config", [{}, LOUD], ids=["zero", "untouched"])
@pytest.mark.parametrize("kind", kinds("nf4", "int8", "hqq", "torchao"))
@pytest.mark.filterwarnings("ignore:Merge lora module to")
def test_merged_weights_are_the_sum_quantised_anew(kind: str, config: Any) -> None:
    """As PEFT merges any LoRA into such a base: what is added is s (B A − B0 A0), and rounded."""
    peft_model = trained_on(kind, **config)
    inside = peft_model.base_model.model
    expected = {
        name: values(inside)[name].weight() + layer.get_delta_weight("default").detach()
        for name, layer in layers(inside).items()
    }
    merged = values(peft_model.merge_and_unload())
    rounding = {"nf4": 0.12, "hqq": 0.12, "int8": 0.02, "torchao": 0.02}[kind]
    for name, W in expected.items():
        assert merged[name].quantised and LIBRARIES[kind] in merged[name].kind.lower()
        assert (merged[name].weight() - W).std() < rounding * W.std()


@pytest.mark.parametrize("kind", kinds())
def test_a_second_adapter_with_the_same_start(kind: str) -> None:
    """TRL's reference, and what a layer of another class is, to PEFT, in print and in pickles."""
    base = quantised(kind)
    peft_model = peft_of(base)
    plain = {name: (type(m), repr(m)) for name, m in layers(peft_model).items()}
    initialised(peft_model, **LOUD)
    peft_model.add_adapter("ref", peft_model.peft_config["default"])
    for name, layer in layers(peft_model).items():
        assert isinstance(layer, plain[name][0])
        assert repr(layer).splitlines()[0] == plain[name][1].splitlines()[0]
        assert torch.equal(layer.lora_A["ref"].start, layer.lora_A["default"].start)
        assert type(layer) is type(pickle.loads(pickle.dumps(type(layer))) and layer)
    expected = logits(peft_model)
    peft_model.set_adapter("ref")
    torch.testing.assert_close(logits(peft_model), expected, **CLOSE)
    peft_model.delete_adapter("ref")
    initialised(peft_model, start="zero")
    assert {type(m) for m in layers(peft_model).values()} == {k for k, _ in plain.values()}


@pytest.mark.parametrize("kind", kinds("nf4", "int8", "torchao"))
def test_a_deep_copy(kind: str) -> None:
    peft_model = peft_of(quantised(kind))
    initialised(peft_model, **LOUD)
    twin = copy.deepcopy(peft_model)
    assert torch.equal(logits(twin), logits(peft_model))
    trained(twin.train(), rate=1e-3)
    assert not torch.equal(logits(twin.eval()), logits(peft_model))


@pytest.mark.parametrize("config", [{}, LOUD], ids=["zero", "untouched"])
@pytest.mark.parametrize("kind", kinds("nf4", "int8", "torchao"))
def test_a_trainer_resumes(kind: str, config: Any, tmp_path: Path) -> None:
    """In one go, and stopped after two steps, on a base that was quantised anew."""
    found = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        if stops:
            first = peft_of(quantised(kind))
            initialised(first, **config)
            trainer_of(first, folder, 2).train()
        peft_model = peft_of(quantised(kind))
        initialised(peft_model, **config)
        trainer_of(peft_model, folder, 4).train(resume_from_checkpoint=stops)
        found.append(logits(peft_model.eval()))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_state_dicts_resume(kind: str) -> None:
    """A Trainer's resume: the adapter's tensors into a model of the same start, and of another."""
    peft_model = trained_on(kind, **LOUD)
    other = peft_of(quantised(kind))
    initialised(other, **{**LOUD, "select": "max"})
    state = {k: v for k, v in peft_model.state_dict().items() if "lora_" in k}
    other.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(other), logits(peft_model), **CLOSE)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", kinds("nf4"))
def test_a_folder_is_quantised_as_it_is_loaded(kind: str, double: bool, tmp_path: Path) -> None:
    from quantised_bases import plain_folder

    lora = LoraConfig(r=8, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    config = quantization_of(plain_folder(), "nf4", double=double)
    how: Any = {"device": "cpu", "show_progress_bar": False}
    report = initialize_folder(
        plain_folder(), batches(), tmp_path / "adapter", lora, FiletConfig(samples=None),
        quantization_config=config, **how,
    )  # fmt: skip
    base = quantised("nf4 twice" if double else "nf4")
    expected = initialised(peft_of(base, target_modules=["up_proj", "down_proj"]))
    for name, module in expected.modules.items():
        torch.testing.assert_close(report.modules[name].energies, module.energies)
    loaded = filet.load(quantised("nf4 twice" if double else "nf4"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(base), **CLOSE)
    other = initialize_folder(
        plain_folder(), batches(), tmp_path / "other", lora, FiletConfig(samples=None),
        engine="blockwise", quantization_config=config, **how,
    )  # fmt: skip
    for name, module in report.modules.items():
        torch.testing.assert_close(other.modules[name].energies, module.energies)
    base = quantised(kind)
    base.save_pretrained(tmp_path / "four bits")
    again = initialize_folder(
        tmp_path / "four bits",
        batches(),
        tmp_path / "third",
        lora,
        FiletConfig(samples=None),
        **how,
    )
    if not double:
        for name, module in report.modules.items():
            torch.testing.assert_close(again.modules[name].energies, module.energies)
    with pytest.raises(ValueError, match="is quantised already"):
        initialize_folder(
            tmp_path / "four bits", batches(), tmp_path / "fourth", lora,
            quantization_config=config, **how,
        )  # fmt: skip


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_checkpoint_with_a_packed_head(storage: torch.dtype, tmp_path: Path) -> None:
    """PEFT's own saving has its codes, which may lie in a floating dtype: they are the base's."""
    pytest.importorskip("bitsandbytes")

    def base() -> Any:
        return of_bits(load_in_4bit=True, llm_int8_skip_modules=[], bnb_4bit_quant_storage=storage)

    peft_model = peft_of(base(), target_modules=["q_proj", "lm_head"])
    initialised(peft_model)
    trained(peft_model.train())
    peft_model.save_pretrained(str(tmp_path))
    loaded = filet.load(base(), tmp_path).train()
    torch.testing.assert_close(logits(loaded), logits(peft_model), rtol=1e-5, atol=1e-5)
