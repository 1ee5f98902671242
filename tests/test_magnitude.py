"""How large A is, and the first gradient of B: whatever the loss, the batch and the dtypes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import oracle
from filet import FiletConfig, FiletReport, apply_statistics, collect_statistics
from initialised import halves_of, initialized, layer_of
from models import RANK, case, collate, loader, peft_of, truth, weight_of

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-8  # of Adam


def in_dtype(dtype: torch.dtype) -> PeftModel:
    """A model with its adapter in a dtype, which PEFT would make float32."""
    peft_model = peft_of(case("llama"), "cpu", dtype)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return peft_model


def factors(peft_model: PeftModel, side: str) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if f".lora_{side}." in name
    }


@pytest.mark.parametrize("select", ["min", "max", "random"])
@pytest.mark.parametrize("scaling", ["fisher", "singular", "constant_min", "constant_max"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("orthogonal", [False, True], ids=["as they are", "orthogonal"])
def test_the_papers_proportions(kind: str, scaling: str, select: str, orthogonal: bool) -> None:
    """A = diag(c)^½ V̂ᵀ of Algorithm 1, with c over its mean times γ, in float64; or Q of V̂."""
    c, gamma = case(kind), 0.7
    peft_model = peft_of(c)
    how = {"scaling": scaling, "select": select, "gamma": gamma, "orthogonal": orthogonal}
    report = initialized(peft_model, loader(c.samples), **how)
    for name, energies in truth(kind).items():
        W = weight_of(c.model, name).double()
        chosen = report.modules[name].indices
        V = oracle.normalize_columns(W.T @ W)[:, chosen]
        if orthogonal:
            V, R = torch.linalg.qr(V)
            V = V * R.diagonal().sign()
        sizes = (W @ V).norm(dim=0) if scaling == "singular" else energies[chosen]
        if scaling.startswith("constant"):
            sizes = torch.ones(RANK, dtype=torch.float64)
        expected = (gamma * sizes / sizes.mean()).sqrt().unsqueeze(1) * V.T
        layer = layer_of(peft_model, name)
        A = layer.lora_A["default"].weight.detach().double()
        assert (A - expected).abs().max() < 1e-4 * expected.abs().max(), name
        assert not layer.lora_B["default"].weight.any()


def summed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


def test_neither_reduction_nor_batch_nor_number_of_terms_matters() -> None:
    samples = case("llama").samples
    variants: dict[str, dict[str, Any]] = {
        "mean": {"batches": loader(samples)},
        "sum": {"batches": loader(samples), "forward_fn": summed, "loss_reduction": "sum"},
        "one at a time": {"batches": loader(samples, 1)},
        "all at once": {"batches": loader(samples, len(samples))},
        "ten times": {"batches": list(loader(samples)) * 10},
    }
    found: dict[str, dict[str, dict[str, Tensor]]] = {"relative": {}, "mean": {}}
    for name, variant in variants.items():
        for normalization, results in found.items():
            peft_model = peft_of(case("llama"))
            initialized(peft_model, **variant, normalization=normalization)
            results[name] = factors(peft_model, "A")
    for name, results in found["relative"].items():
        for key, A in found["relative"]["mean"].items():
            error = (results[key] - A).abs().max() / A.abs().max()
            assert error < 1e-3, (name, key)
    # The paper's own magnitude is not that of LoRA, and depends on the data.
    for key, A in found["mean"]["mean"].items():
        assert A.norm() < 0.1 * found["relative"]["mean"][key].norm()
        assert found["mean"]["ten times"][key].norm() < 0.5 * A.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["energies", "contrast"])
def test_a_is_as_large_as_loras_default(keep: bool, dtype: torch.dtype) -> None:
    """With γ = 1/3 it is √(r / 3), about which PEFT draws; no row is far from the others."""
    lora, ours = in_dtype(dtype), in_dtype(dtype)
    kept = loader(case("llama").samples[::-1]) if keep else None
    report = initialized(ours, keep=kept, gamma=1 / 3)
    assert report.config["select"] == ("contrast" if keep else "min")
    for (name, A), default in zip(
        factors(ours, "A").items(), factors(lora, "A").values(), strict=True
    ):
        A, default = A.detach().float(), default.detach().float()
        assert A.dtype == default.dtype and A.shape == default.shape
        assert float(A.norm()) == pytest.approx((RANK / 3) ** 0.5, rel=5e-3), name
        assert 0.7 < float(A.norm() / default.norm()) < 1.4, name
        rows = A.norm(dim=1) / default.norm(dim=1)
        assert 0.1 < float(rows.min()) and float(rows.max()) < 4, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_gradient_of_b_is_far_above_adams_epsilon(dtype: torch.dtype) -> None:
    """And not far below that of PEFT's default on the same batch, in the same dtype."""
    batch = collate(case("llama").samples)
    sizes = {}
    for name in ("LoRA", "FILet", "the paper's"):
        torch.manual_seed(0)
        peft_model = in_dtype(dtype)
        if name != "LoRA":
            more = {} if name == "FILet" else {"normalization": "mean"}
            with warnings.catch_warnings():  # in float16 the paper's rows are all zero
                warnings.simplefilter("ignore")
                initialized(peft_model, **more)
        peft_model.eval()
        peft_model(**batch).loss.backward()
        assert not any(A.grad.any() for A in factors(peft_model, "A").values())
        gradients = [B.grad.float() for B in factors(peft_model, "B").values()]
        sizes[name] = [float(gradient.square().mean().sqrt()) for gradient in gradients]
    for ours, lora in zip(sizes["FILet"], sizes["LoRA"], strict=True):
        assert ours > 1e3 * EPSILON
        assert ours > 0.02 * lora
    # With the paper's magnitude it would not be so.
    assert max(sizes["the paper's"]) < 0.1 * max(sizes["FILet"])


def statistics_of_energies(factor: float) -> Any:
    """Statistics by which every energy is so many times what it is."""
    statistics = collect_statistics(
        peft_of(case("llama")),
        loader(case("llama").samples),
        FiletConfig(samples=None),
        show_progress_bar=False,
    )
    for moments in statistics.moments.values():
        moments.output.sum.mul_(factor)
    return statistics


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_a_start_below_what_adam_lets_train_is_said(start: str) -> None:
    """The paper's literal magnitude, by gradients as small as a large model's."""
    statistics = statistics_of_energies(1e-12)
    for normalization, expected in (("mean", 1), ("sum", 1), ("relative", 0)):
        config = FiletConfig(start=start, normalization=normalization)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apply_statistics(peft_of(case("llama")), statistics, config)
        said = [str(w.message) for w in caught if "Adam's ε" in str(w.message)]
        assert len(said) == expected, normalization
        assert all("expected normalization='relative'" in text for text in said)
        assert not any("will not train" in str(w.message) for w in caught)


def test_directions_without_energy_train_all_the_same() -> None:
    statistics = statistics_of_energies(0)

    def applied(**config: Any) -> tuple[PeftModel, FiletReport, list[str]]:
        peft_model = peft_of(case("llama"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = apply_statistics(peft_model, statistics, FiletConfig(**config))
        said = [str(w.message) for w in caught if "will not train" in str(w.message)]
        return peft_model, report, said

    peft_model, report, said = applied()
    assert not said and not any(module.chosen().any() for module in report.modules.values())
    for A in factors(peft_model, "A").values():
        torch.testing.assert_close(A.norm(dim=1), torch.full((RANK,), FiletConfig.gamma**0.5))
    for start in ("zero", "untouched"):
        peft_model, _, said = applied(start=start, normalization="mean")
        assert len(said) == 1 and "expected normalization='relative'" in said[0]
        assert not any(A.any() for A in factors(peft_model, "A").values())


@pytest.mark.parametrize("keep", [False, True], ids=["energies", "contrast"])
def test_both_starts_have_the_same_a(keep: bool) -> None:
    zero, untouched = peft_of(case("llama")), peft_of(case("llama"))
    kept = loader(case("llama").samples[::-1]) if keep else None
    report = initialized(zero, keep=kept, gamma=2.0)
    initialized(untouched, keep=kept, gamma=2.0, start="untouched")
    for name in report.modules:
        A, B, A0, B0 = halves_of(layer_of(untouched, name))
        mine = layer_of(zero, name).lora_A["default"].weight.detach().double()
        assert torch.equal(A, A0) and torch.equal(B, B0) and torch.equal(mine, A0)
        torch.testing.assert_close(B0.norm(dim=0), A0.norm(dim=1), rtol=1e-5, atol=0)
        assert float(A0.square().sum(1).mean()) == pytest.approx(2.0, rel=1e-5)
