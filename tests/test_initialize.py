"""From a PeftModel and data to an initialised one: what is written, refused, and reported."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import oracle
from filet import (
    FiletConfig,
    FiletReport,
    apply_statistics,
    collect_statistics,
    initialize_lora_filet_weights,
)
from initialised import (
    LOUD,
    UNTOUCHED,
    assert_bitwise,
    base_weights,
    halves_of,
    initialized,
    layer_of,
    logits_of,
    warnings_of,
    weights,
)
from models import (
    LENGTHS,
    RANK,
    Case,
    assert_energies,
    case,
    collate,
    loader,
    peft_of,
    truth,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


# What is written.


@pytest.mark.parametrize("normalization", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_and_residual(kind: str, normalization: str, device: torch.device) -> None:
    """Selection, A, B and W − s B0 A0 of Algorithm 1, from energies that are the oracle's own."""
    c = case(kind)
    peft_model = peft_of(c, device)
    report = initialized(
        peft_model, loader(c.samples), **{**UNTOUCHED, "normalization": normalization}
    )
    factor = report.loss_terms**2 if normalization == "sum" else 1
    for name, energies in truth(kind).items():
        layer, W = layer_of(peft_model, name), weight_of(c.model, name)
        scale = layer.scaling["default"]
        A, B, residual = oracle.factors(W, energies * factor, RANK, scale)
        trained_A, trained_B, A0, B0 = halves_of(layer)
        assert torch.equal(trained_A, A0) and torch.equal(trained_B, B0)
        base = weight_of(layer.get_base_layer(), "").cpu().double()
        written = {"A": (A0, A), "B": (B0, B), "W_res": (base - scale * B0 @ A0, residual)}
        for what, (ours, theirs) in written.items():
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-5, f"{name} {what}: {error:.3g}"


@needs_two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_device_map_over_two_gpus(dtype: torch.dtype) -> None:
    alone = peft_of(case("llama"), "cuda:0", dtype)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    model = dispatch_model(copy.deepcopy(case("llama").model).to(dtype), places)
    split = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=8, target_modules=case("llama").targets)
    )
    before = logits_of(split)
    report, expected = initialized(split, **LOUD), initialized(alone, **LOUD)
    rounding = torch.finfo(dtype).eps / 2
    assert (logits_of(split) - before).abs().max() <= 40 * rounding * before.abs().max()
    devices = set()
    for name, module in report.modules.items():
        layer = layer_of(split, name)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.weight]
        assert len({weight.device for weight in weights}) == 1
        devices.add(layer.weight.device.index)
        assert module.input_tokens == expected.modules[name].input_tokens > 0
    assert devices == {0, 1}
    energies = {name: module.energies for name, module in report.modules.items()}
    truth = {name: module.energies for name, module in expected.modules.items()}
    # By other kernels than on one device: a device map has forwards of its own.
    assert_energies(energies, truth, 1e-5 if dtype == torch.float32 else 6e-2)


@needs_two_gpus
def test_another_gpu_than_the_current_one() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in loader(case("llama").samples):
            torch.cuda._sleep(500_000_000)  # what is launched on the current one comes too late
            yield batch

    reports = [
        initialized(peft_of(case("llama"), device, torch.bfloat16), batches())
        for device in ("cuda:0", "cuda:1")
    ]
    for name, module in reports[0].modules.items():
        other = reports[1].modules[name]
        torch.testing.assert_close(other.energies, module.energies, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(module.indices, other.indices), name


@pytest.mark.parametrize("scaling", ["fisher", "singular", "constant_max"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
def test_function_and_base_are_preserved(
    scaling: Any, dtype: torch.dtype, rounding: float, device: torch.device
) -> None:
    peft_model = peft_of(case("llama"), device, dtype)
    before, original = logits_of(peft_model), base_weights(peft_model)
    report = initialized(peft_model, **{**LOUD, "scaling": scaling})
    after = logits_of(peft_model)
    # Two layers of seven roundings each, in front of a head.
    assert (after - before).abs().max() <= 40 * rounding * before.abs().max()
    for name, module in report.modules.items():
        A, B, A0, B0 = halves_of(layer_of(peft_model, name))
        assert torch.equal(B @ A, B0 @ A0) and (B.norm(dim=0) * A.norm(dim=1) > 0).all()
        assert len(A) == module.rank == RANK
        if scaling == "singular":
            W = original[f"base_model.model.{name}.base_layer.weight"].cpu().double()
            assert (layer_of(peft_model, name).scaling["default"] * B0 @ A0).norm() > 0.1 * W.norm()
    now = base_weights(peft_model)
    assert all(torch.equal(now[name], weight) for name, weight in original.items())
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora(rslora: bool) -> None:
    peft_model = peft_of(
        case("llama"),
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
        alpha_pattern={"layers.0.mlp.up_proj": 32},
        use_rslora=rslora,
    )
    before, original = logits_of(peft_model), base_weights(peft_model)
    report = initialized(peft_model, **LOUD)
    assert torch.allclose(logits_of(peft_model), before, atol=1e-4 * float(before.abs().max()))
    for name, module in report.modules.items():
        rank = 2 if "q_proj" in name else 7 if "1.mlp.down_proj" in name else RANK
        alpha = 32 if "0.mlp.up_proj" in name else 8
        scale = alpha / rank**0.5 if rslora else alpha / rank
        assert module.rank == rank == len(module.indices)
        layer = layer_of(peft_model, name)
        assert layer.scaling["default"] == scale
        assert [len(half.squeeze()) for half in halves_of(layer)[::2]] == [rank, rank]
    assert all(torch.equal(base_weights(peft_model)[name], w) for name, w in original.items())


def test_variants(device: torch.device) -> None:
    """Selection and scaling, from the same statistics."""
    c = case("llama")
    statistics = collect_statistics(
        peft_of(c, device), loader(c.samples), FiletConfig(samples=None), show_progress_bar=False
    )

    def apply(**config: Any) -> tuple[FiletReport, PeftModel]:
        peft_model = peft_of(c, device)
        settings: dict[str, Any] = {**UNTOUCHED, **config}
        return apply_statistics(peft_model, statistics, FiletConfig(**settings)), peft_model

    name = c.targets[0]
    order = torch.argsort(truth("llama")[name], stable=True)
    assert torch.equal(apply(select="min")[0].modules[name].indices, order[:RANK])
    assert torch.equal(apply(select="max")[0].modules[name].indices, order.flip(0)[:RANK])
    random = [apply(select="random", seed=s)[0].modules[name].indices for s in (1, 1, 2)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    norms = {}
    for scaling in ("fisher", "singular", "constant_min", "constant_max"):
        report, peft_model = apply(scaling=scaling)
        A, _, _, _ = halves_of(layer_of(peft_model, name))
        norms[scaling] = A.square().sum(1)  # c, as V̂'s columns are unit vectors
        chosen = report.modules[name].chosen()
    W = weight_of(c.model, name).double()
    V = oracle.normalize_columns(W.T @ W)[:, order[:RANK]]
    expected = {
        "fisher": chosen,
        "singular": (W @ V).norm(dim=0),
        "constant_min": chosen.min().expand(RANK),
        "constant_max": chosen.max().expand(RANK),
    }
    for scaling, c_ in expected.items():
        assert torch.allclose(norms[scaling], c_, rtol=1e-5), scaling


def test_normalizations_differ_by_the_terms_squared() -> None:
    reports = {n: initialized(peft_of(case("llama")), normalization=n) for n in ("mean", "sum")}
    terms = reports["mean"].loss_terms
    assert terms == reports["sum"].loss_terms > 1
    for name, module in reports["mean"].modules.items():
        other = reports["sum"].modules[name]
        assert torch.equal(module.indices, other.indices)
        assert torch.allclose(module.energies * terms**2, other.energies, rtol=1e-12)


def test_again_over_an_initialised_adapter() -> None:
    """A second initialisation replaces the first, whatever has been trained since."""
    once, twice = peft_of(case("llama")), peft_of(case("llama"))
    initialized(once, select="min")
    initialized(twice, select="max")
    with torch.no_grad():
        for name, parameter in twice.named_parameters():
            if "lora_A.default" in name:
                parameter.mul_(2)
    again = initialized(twice, select="min")
    assert {module.rank for module in again.modules.values()} == {RANK}
    assert_bitwise(twice, weights(once))
    assert torch.equal(logits_of(once), logits_of(twice))


# The report.


def test_report(device: torch.device) -> None:
    c = case("llama")
    peft_model = peft_of(c, device)
    report = initialized(peft_model, seed=3)
    assert list(report.modules) == c.targets and report.left_default == {}
    assert (report.samples, report.tokens) == (len(LENGTHS), sum(LENGTHS))
    assert report.config["seed"] == 3
    assert set(report.seconds) == {"statistics", "selection", "writing"}
    assert all(0 < seconds < 60 for seconds in report.seconds.values())
    assert report.peak_memory > 2**20
    assert_energies({n: m.energies for n, m in report.modules.items()}, truth("llama"), 1e-4)
    for name, module in report.modules.items():
        W = weight_of(c.model, name)
        assert module.shape == tuple(W.shape) and module.energies.shape == (W.shape[1],)
        assert module.energies.dtype == torch.float64 and module.energies.device.type == "cpu"
        assert module.input_tokens == module.output_tokens == sum(LENGTHS)
        assert module.shared_input in (None, *c.targets)
        assert module.output_space == ("g" if W.shape[0] <= W.shape[1] else "h")
    assert "q_proj" in report.table()


def test_default_config_reads_320_samples() -> None:
    c = case("llama")
    batch = collate(c.samples)

    def batches() -> Iterator[Any]:
        for _ in range(27):  # 324 samples
            yield batch
        raise AssertionError("read past 320 samples")

    report = initialize_lora_filet_weights(peft_of(c), batches(), show_progress_bar=False)
    assert report.samples == 320


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    c = case("llama")
    initialize_lora_filet_weights(peft_of(c), loader(c.samples))
    shown = capfd.readouterr().err
    assert "12/12" in shown and "tokens/s" in shown
    initialize_lora_filet_weights(peft_of(c), loader(c.samples), show_progress_bar=False)
    assert "12/12" not in capfd.readouterr().err


# Several adapters.


def test_other_adapter_keeps_its_function() -> None:
    peft_model = peft_of(case("llama"))
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".other." in name:
                parameter.normal_()
    default = logits_of(peft_model)
    peft_model.set_adapter("other")
    other = logits_of(peft_model)
    assert not torch.allclose(default, other, atol=1e-2)
    initialized(peft_model, **LOUD)
    assert peft_model.active_adapters == ["other"]
    assert torch.equal(logits_of(peft_model), other)
    peft_model.set_adapter("default")
    assert torch.allclose(logits_of(peft_model), default, atol=1e-4)


def test_adapters_on_other_modules_do_not_stand_in_the_way() -> None:
    c = case("llama")
    peft_model = peft_of(Case(c.model, c.samples, ["gate_proj"]))
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = logits_of(peft_model)
    report = initialized(peft_model, **LOUD)
    assert len(report.modules) == 2
    assert torch.allclose(logits_of(peft_model), before, atol=1e-4)


# Weights on the meta device, and failures.


def test_low_cpu_mem_usage() -> None:
    c = case("llama")
    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules=[*c.targets, "embed_tokens"])
    peft_model = get_peft_model(copy.deepcopy(c.model), lora, low_cpu_mem_usage=True)
    assert layer_of(peft_model, c.targets[0]).lora_A["default"].weight.device.type == "meta"
    report, said = warnings_of(peft_model, **LOUD)
    assert list(report.left_default) == ["model.embed_tokens"] and len(said) == 1
    for name, parameter in peft_model.named_parameters():
        assert parameter.device.type == "cpu", name
        assert parameter.requires_grad == ("lora_" in name), name
    plain = get_peft_model(copy.deepcopy(c.model), lora)
    warnings_of(plain, **LOUD)
    ours, theirs = weights(peft_model), weights(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if "lora_embedding_A" not in name and "lora_embedding_B" not in name:
            assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        before = logits_of(c.model)
    assert torch.allclose(logits_of(peft_model), before, atol=1e-4)


def test_nothing_is_written_before_all_has_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    import filet.select

    peft_model = peft_of(case("llama"))
    before = weights(peft_model)
    inner, calls = filet.select.lora_factors, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(filet.select, "lora_factors", fails)
    with pytest.raises(KeyboardInterrupt):
        initialized(peft_model)
    assert_bitwise(peft_model, before)
    assert list(peft_model.peft_config) == ["default"]
    monkeypatch.undo()
    initialized(peft_model)


def test_invalid_config() -> None:
    for wrong in (
        {"start": "residual"},
        {"select": "least"},
        {"normalization": "none"},
        {"gamma": 0.0},
        {"gamma": float("inf")},
        {"gamma": float("nan")},
        {"gamma": "1/3"},
        {"gamma": 1e11},
        {"gamma": True},
        {"damping": True},
        {"orthogonal": 1},
        {"gamma": 0.5, "normalization": "sum"},
        {"scaling": None},
        {"samples": 0},
        {"samples": 2.5},
        {"seed": -1},
        {"share_inputs": 1},
        {"loss_reduction": "none"},
        {"samples": True},
        {"seed": True},
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*expected"):
            FiletConfig(**wrong)
