"""Quantised layers and the dtype of what comes in: W, y and h as the layer has them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from quantised_bases import batches, initialised, kinds, linears, peft_of, plain, quantised
from torch import Tensor

from filet import FiletConfig, collect_statistics
from filet.model.targets import find_targets

UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))  # (128, 64), (64, 128)


def prepared(model: Any) -> Any:
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def by_hand(compute: torch.dtype | None, dtype: torch.dtype) -> Any:
    """bitsandbytes' 4-bit layers in place of a model's own, as one makes them without a config."""
    import bitsandbytes

    model = plain(dtype)
    for name, old in linears(model).items():
        m, n = old.weight.shape
        how: Any = {"compute_dtype": compute, "quant_type": "nf4"}
        new = bitsandbytes.nn.Linear4bit(n, m, bias=old.bias is not None, **how)
        new.load_state_dict(old.state_dict())
        new.to("cpu")
        new.bias = old.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def products(base: Any) -> dict[str, Tensor]:
    """Σ y yᵀ of a layer and Σ h hᵀ of another, from what goes through the model as it trains."""
    found: dict[str, Tensor] = {}
    base.train().requires_grad_(False)
    base.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())

    def add(name: str, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, -2).double()
        found[name] = found.get(name, 0) + rows.T @ rows

    def watch_up(module: Any, args: Any) -> Any:
        x = args[0].view_as(args[0])  # of which nobody else has the gradient
        x.register_hook(lambda h: add(UP, h))
        return (x,)

    def watch_down(module: Any, args: Any, output: Tensor) -> None:
        add(DOWN, output)  # it has no bias

    found_linears = linears(base)
    found_linears[UP].register_forward_pre_hook(watch_up)
    found_linears[DOWN].register_forward_hook(watch_down)
    for batch in batches():
        (base(**batch, use_cache=False).loss * batch["labels"][:, 1:].numel()).backward()
    return found


def moments(base: Any) -> dict[str, Tensor]:
    config = FiletConfig(samples=None)
    found = collect_statistics(peft_of(base), batches(), config, show_progress_bar=False).moments
    assert (found[UP].output.space, found[DOWN].input.space) == ("h", "y")
    return {UP: found[UP].output.sum, DOWN: found[DOWN].input.sum}


def assert_moments(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name, theirs in expected.items():
        difference = (found[name].double() - theirs).tril()
        assert difference.norm() < rtol * theirs.tril().norm(), name


@pytest.mark.parametrize("kind", kinds("int8"))
def test_int8_multiplies_in_the_dtype_of_its_input(kind: str) -> None:
    """The model says bfloat16, and after the preparation its layers get and give float32."""
    expected = products(prepared(quantised(kind, torch.bfloat16)))
    base = prepared(quantised(kind, torch.bfloat16))
    assert_moments(moments(base), expected, 1e-5)
    targets, _ = find_targets(peft_of(base), "default")
    W = targets[UP].weight
    scales = targets[UP].base.state.SCB.double()[:, None] / 127
    torch.testing.assert_close(
        W.double(), targets[UP].base.weight.double() * scales, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("says", ["bfloat16", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", kinds("nf4"))
def test_a_layer_without_a_compute_dtype(kind: str, dtype: torch.dtype, says: str | None) -> None:
    """Its first input gives it one, whatever the config of the model says."""

    def base(compute: torch.dtype | None) -> Any:
        model = by_hand(compute, torch.bfloat16)
        model.config.dtype = says
        return prepared(model) if dtype == torch.float32 else model

    expected = initialised(peft_of(base(dtype)))
    peft_model = peft_of(base(None))
    targets, _ = find_targets(peft_model, "default")
    before = {name: target.weight for name, target in targets.items()}
    for _ in range(2):
        report = initialised(peft_model)
        for name, module in report.modules.items():
            assert torch.equal(module.energies, expected.modules[name].energies), name
    for name, target in targets.items():
        assert target.weight.dtype == dtype and torch.equal(target.weight, before[name])


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_the_moments_of_a_layer_without_a_compute_dtype(kind: str) -> None:
    expected = products(prepared(by_hand(None, torch.bfloat16)))
    assert_moments(moments(prepared(by_hand(None, torch.bfloat16))), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", kinds("hqq"))
def test_hqq_that_cannot_be_trained_is_refused(
    kind: str, dtype: torch.dtype, prepares: bool, autocast: bool
) -> None:
    """Where plain PEFT fails in its backward, and nowhere else."""

    def forward(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss: Tensor = model(**batches()[0]).loss
        return loss

    base = quantised(kind, dtype)
    peft_model = peft_of(prepared(base) if prepares else base)
    refused: Any = contextlib.nullcontext()
    try:
        forward(peft_model.train()).backward()
    except RuntimeError as error:
        assert "to have the same dtype" in str(error)
        got = "under autocast to torch.bfloat16" if autocast else "with an input in torch.float32"
        refused = pytest.raises(
            ValueError,
            match=rf"q_proj: an HQQLinear of compute_dtype={dtype} cannot be trained {got}",
        )
    failed = not isinstance(refused, contextlib.nullcontext)
    assert failed == ((dtype == torch.float32) == autocast and (autocast or prepares))
    with refused, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        initialised(peft_model)
