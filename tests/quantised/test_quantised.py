"""Initialising on quantised bases: the moments are of the model that will be trained."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from quantised_bases import (
    PRODUCTS,
    TARGETS,
    assert_energies,
    assert_stored,
    batches,
    dense,
    initialised,
    kinds,
    linears,
    logits,
    peft_of,
    quantised,
    stored,
    trained,
    values,
)
from torch import Tensor

import oracle
from filet import FiletReport
from filet.collect import unrounded

# Of an energy: 1e-5 in float32, and 1e-3 in bfloat16, where two models round alike.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
DTYPES = list(RTOL)

# On a GPU bitsandbytes multiplies so few rows by a kernel of its own, in another order.
RTOL_ON_GPU = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def energies(report: FiletReport) -> dict[str, Tensor]:
    return {name: module.energies for name, module in report.modules.items()}


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds(*PRODUCTS))
def test_energies_are_those_of_a_dense_model(
    kind: str, dtype: torch.dtype, start: str, device: torch.device
) -> None:
    base = quantised(kind, dtype, device)
    if kind == "hqq":  # which rounds the product before it adds the bias
        for module in linears(base).values():
            module.bias = None
    expected = initialised(peft_of(dense(base)), start=start)
    before = stored(base)
    report = initialised(peft_of(base), start=start)
    assert not report.left_default and len(report.modules) == 2 * len(TARGETS)
    assert_energies(
        report, energies(expected), (RTOL if device.type == "cpu" else RTOL_ON_GPU)[dtype]
    )
    for name, module in report.modules.items():
        chosen = expected.modules[name].indices
        assert device.type != "cpu" or torch.equal(module.indices, chosen)
    assert_stored(base, before)


@pytest.mark.parametrize("kind", kinds("int8", "torchao"))
def test_energies_of_int8_are_those_of_a_dense_model(kind: str) -> None:
    base = quantised(kind)
    assert_energies(initialised(peft_of(base)), energies(initialised(peft_of(dense(base)))), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds())
def test_energies_are_algorithm_1_of_what_goes_through(kind: str, dtype: torch.dtype) -> None:
    """Inputs and gradients of the quantised model itself, in training, by hooks of torch's."""
    base = quantised(kind, dtype).train()  # it has no dropout
    weights = {name: its.weight() for name, its in values(base).items()}
    inputs: dict[str, list[Tensor]] = {name: [] for name in weights}
    gradients: dict[str, list[Tensor]] = {name: [] for name in weights}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            inputs[name].append(args[0].detach().flatten(0, -2))
            output.register_hook(lambda g: gradients[name].append(g.flatten(0, -2)))

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in linears(base).items()]
    base.requires_grad_(False)
    base.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    terms = 0
    for batch in batches():
        count = batch["labels"][:, 1:].numel()
        (base(**batch, use_cache=False).loss * count).backward()
        terms += count
    for handle in handles:
        handle.remove()
    expected = {
        name: oracle.fisher_energies(
            weights[name], torch.cat(x), torch.cat(gradients[name]) / terms
        )
        for name, x in inputs.items()
        if name.rpartition(".")[2] in TARGETS
    }
    # The head and the loss of the pass are other operations, which bfloat16 rounds elsewhere.
    assert_energies(initialised(peft_of(base)), expected, 2e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", kinds(*PRODUCTS))
def test_layers_hand_their_products_on(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: y and h come from the products that the layer makes anyway, its own and ours."""
    monkeypatch.setattr(unrounded, "HANDS_ON", set())
    formed = initialised(peft_of(quantised(kind, dtype)))
    monkeypatch.setattr(unrounded, "HANDS_ON", {"cpu"})
    handed: list[str] = []
    take = unrounded.UnroundedLinear.forward

    def forward(ctx: Any, x: Tensor, hooks: Any, target: Any) -> Tensor:
        handed.append(target.name)
        assert x.dtype == dtype
        return take(ctx, x, hooks, target)

    monkeypatch.setattr(unrounded.UnroundedLinear, "forward", staticmethod(forward))
    report = initialised(peft_of(quantised(kind, dtype)))
    assert {name.rpartition(".")[2] for name in handed} == {"up_proj", "down_proj"}
    # The rounded products differ in their last bits, and with them what comes after.
    assert_energies(report, energies(formed), 0.05)


@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
@pytest.mark.parametrize("handed_on", [True, False])
def test_a_layer_that_rounds_its_input(
    kind: str, handed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare_model_for_kbit_training casts the norms: x is float32 where 4 bits take bfloat16."""
    monkeypatch.setattr(unrounded, "HANDS_ON", {"cpu"} if handed_on else set())
    base = quantised(kind, torch.bfloat16)
    expected = initialised(peft_of(quantised(kind, torch.bfloat16)))
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert prepared.model.norm.weight.dtype == torch.float32
    before, entered = stored(prepared), []
    take = unrounded.UnroundedLinear.forward

    def forward(ctx: Any, x: Tensor, hooks: Any, target: Any) -> Tensor:
        entered.append(x.dtype)
        return take(ctx, x, hooks, target)

    monkeypatch.setattr(unrounded.UnroundedLinear, "forward", staticmethod(forward))
    report = initialised(peft_of(prepared))
    assert set(entered) == ({torch.bfloat16} if handed_on and kind == "nf4" else set())
    assert_energies(report, energies(expected), 0.1)  # the residual stream is not rounded now
    assert_stored(prepared, before)


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("kind", kinds())
def test_the_function_stays_and_training_lowers_the_loss(kind: str, start: str) -> None:
    base = quantised(kind)
    before, as_it_was = logits(base), stored(base)
    peft_model = peft_of(base)
    initialised(peft_model, start=start)
    torch.testing.assert_close(logits(peft_model), before, rtol=1e-5, atol=1e-5)
    losses = trained(peft_model.train())
    assert losses[-1] < losses[0]
    assert_stored(base, as_it_was)
    assert not torch.equal(logits(peft_model.eval()), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", kinds("nf4", "torchao"))
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    expected = energies(initialised(peft_of(quantised(kind))))
    base = quantised(kind)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peft_model = peft_of(base).train()
    assert_energies(initialised(peft_model), expected, 1e-6)
    peft_model.enable_input_require_grads()
    losses = trained(peft_model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", kinds("nf4 twice", "int8", "torchao"))
def test_prepare_model_for_kbit_training(kind: str, first: bool) -> None:
    """Before the initialisation and after it; in float32 it changes no number."""
    expected = energies(initialised(peft_of(quantised(kind))))
    base = quantised(kind)
    if first:
        base = prepare_model_for_kbit_training(base)
    peft_model = peft_of(base)
    assert_energies(initialised(peft_model, start="untouched"), expected, 1e-5)
    if not first:
        prepare_model_for_kbit_training(peft_model)
        for name, parameter in peft_model.named_parameters():  # which it froze, ours as PEFT's
            parameter.requires_grad_("lora_" in name)
    losses = trained(peft_model.train())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_biases_are_what_they_were(kind: str) -> None:
    model = peft_of(prepare_model_for_kbit_training(quantised(kind, torch.bfloat16)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 1e-4  # no bfloat16
    before = {n: p.data.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    initialised(model)
    found = dict(model.named_parameters())
    assert before
    for name, bias in before.items():
        assert found[name].dtype == bias.dtype and torch.equal(found[name].data, bias), name


@pytest.mark.parametrize("kind", kinds("nf4", "int8", "torchao"))
def test_data_to_keep(kind: str) -> None:
    base = quantised(kind)
    expected = initialised(peft_of(dense(base)), keep=batches()[:1], start="untouched")
    peft_model = peft_of(base)
    before = logits(peft_model)
    report = initialised(peft_model, keep=batches()[:1], start="untouched")
    assert {module.kind for module in report.modules.values()} == {"contrast"}
    assert_energies(report, energies(expected), 1e-4)
    torch.testing.assert_close(logits(peft_model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", kinds("nf4", "hqq"))
def test_no_dequantised_model_is_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many of the 8 weights as the energies run ahead of what is chosen."""
    import gc
    import weakref

    from filet.model.values import Values

    base = quantised(kind)
    its_class = type(next(iter(values(base).values())))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    weight = its_class.weight

    def watched(self: Values, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal most
        W = weight(self, dtype)
        alive.add(W)
        gc.collect()
        most = max(most, len(alive))
        return W

    monkeypatch.setattr(its_class, "weight", watched)
    initialised(peft_of(base))
    assert 1 <= most <= 2


def test_another_library_is_not_imported() -> None:
    import subprocess
    import sys

    program = (
        "import sys, filet, filet.model.values\n"
        "assert not {'bitsandbytes', 'torchao', 'hqq', 'gptqmodel'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_reentrant.*")
        yield
