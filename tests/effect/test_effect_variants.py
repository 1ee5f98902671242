"""Adapters of K members against PEFT's layers, and against their formulas in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from contexts import RANK, context
from torch import nn

import models
from effect.of_peft import adapted
from effect.population import Flat, Population, PopulationLinear
from effect.runs import train_population
from effect.start import Start
from effect.tasks import CausalTask
from effect.train import Member, Recipe
from effect.variants import VARIANTS, Dora, Kasa, launch, penalties

NAME = "model.layers.0.mlp.up_proj"  # 48 × 32
MEMBERS = 3


def linear(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 48).requires_grad_(False).to(dtype)


def starts(seed=1) -> list[Start]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(RANK, 32, generator=generator) / 4 for _ in range(MEMBERS)]
    return [Start(A, torch.zeros(48, RANK)) for A in draw]


def shaken(adapter, seed=2) -> None:
    """Every parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    for p in (p for group in adapter.groups.values() for p in group):
        p.data += torch.randn(p.shape, generator=generator) / 4


def rows(dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(MEMBERS * 2, 5, 32, generator=torch.Generator().manual_seed(3))
    return x.to(dtype)


def of_member(x: torch.Tensor, k: int) -> torch.Tensor:
    return x[2 * k : 2 * k + 2]


def check(layer, references, parameters, extra=None):
    """Outputs and gradients of a loss against each member's own; ``extra`` is added to the loss."""
    x, weights = rows(), torch.linspace(-1, 1, 48)
    layer.zero_grad()
    y = layer(x)
    loss = (y * weights).square().sum() + (0 if extra is None else extra.sum())
    loss.backward()
    for k, reference in enumerate(references):
        expected, more, its = reference(of_member(x, k))
        torch.testing.assert_close(of_member(y, k), expected, atol=2e-5, rtol=2e-5)
        ((expected * weights).square().sum() + more).backward()
        for mine, truth in zip(parameters, its, strict=True):
            off = (mine.grad[k].double() - truth.grad.reshape(mine.grad[k].shape)).abs().max()
            assert off <= 2e-5 * truth.grad.abs().max(), (k, tuple(truth.shape), float(off))


def test_dora_is_pefts():
    found = adapted(context("llama"), "dora").base_model.model.get_submodule(NAME)
    base = nn.Linear(32, 48)
    base.weight.data, base.bias.data = found.base_layer.weight.detach(), torch.randn(48)
    found.base_layer = base.requires_grad_(False)
    adapter = Dora(base.weight.detach(), starts())
    layer = PopulationLinear(base, adapter, MEMBERS)
    torch.testing.assert_close(layer(rows()), base(rows()))  # B = 0: the base's function
    shaken(adapter)
    copies = [copy.deepcopy(found) for _ in range(MEMBERS)]

    def reference(k):
        its = copies[k]
        own = (
            its.lora_A["default"].weight,
            its.lora_magnitude_vector["default"].weight,
            its.lora_B["default"].weight,
        )
        for p, value in zip(own, (adapter.lora.A, adapter.magnitude, adapter.lora.B), strict=True):
            p.data = value[k].detach().clone()
        return lambda x: (its(x), 0.0, own)

    parameters = (adapter.lora.A, adapter.magnitude, adapter.lora.B)
    check(layer, [reference(k) for k in range(MEMBERS)], parameters)


def test_a_small_gain_is_felt_in_bfloat16():
    base = linear(torch.bfloat16)
    adapter = Dora(base.weight.detach(), starts())
    before = PopulationLinear(base, adapter, MEMBERS)(rows(torch.bfloat16)).detach()
    adapter.magnitude.data *= 1.003  # to bfloat16 that is 1
    after = PopulationLinear(base, adapter, MEMBERS)(rows(torch.bfloat16)).detach()
    assert after.dtype == torch.bfloat16
    unbiased = [(y - base.bias).double() for y in (before, after)]
    ratio = (unbiased[1] * unbiased[0]).sum() / unbiased[0].square().sum()
    assert abs(float(ratio) - 1.003) < 5e-4


def test_dora_refuses_what_subtracts():
    A, B = torch.ones(RANK, 32), torch.ones(48, RANK)
    with pytest.raises(ValueError, match="a start subtracts from W"):
        Dora(linear().weight, [Start(A, B, A, B)])


def test_kasa_is_pefts_with_its_regularisation():
    its = context("llama")
    model = adapted(its, "kasa").base_model.model
    found = VARIANTS["kasa"].starts(its)
    for name, W in its.weights.items():
        start, layer = found[name], model.get_submodule(name)
        assert torch.equal(start.A, layer.lora_A["default"].weight)
        assert torch.equal(start.diag, layer.lora_diag["default"])
        assert not start.B.any() and start.diag.abs().min() > 0
        off = layer.base_layer.weight + start.B0 @ start.A0 - W
        assert off.abs().max() < 5e-6 * W.abs().max()
        assert torch.linalg.matrix_rank(layer.base_layer.weight) == min(W.shape) - RANK
    members = [found[NAME]] * MEMBERS
    base = its.layers[NAME]
    adapter = Kasa(base.weight.detach(), members)
    layer = PopulationLinear(base, adapter, MEMBERS)
    shaken(adapter)
    parameters = (adapter.lora.A, adapter.diag, adapter.lora.B)
    references = []
    for k in range(MEMBERS):
        peft = adapted(its, "kasa")
        for name, other in peft.base_model.model.named_modules():  # the penalty of one layer
            if hasattr(other, "lora_diag") and name != NAME:
                del other.lora_diag["default"]
        own = peft.base_model.model.get_submodule(NAME)
        theirs = (
            own.lora_A["default"].weight,
            own.lora_diag["default"],
            own.lora_B["default"].weight,
        )
        for p, value in zip(theirs, parameters, strict=True):
            p.data = value[k].detach().clone()
        references.append(
            lambda x, own=own, peft=peft, theirs=theirs: (
                own(x),
                1000 * peft.base_model._get_kasa_loss(),
                theirs,
            )
        )
    penalty = penalties({NAME: layer})
    assert penalty.shape == (MEMBERS,)
    check(layer, references, parameters, 1000 * penalty)
    assert (
        penalties({NAME: PopulationLinear(base, Dora(base.weight.detach(), starts()), MEMBERS)})
        is None
    )
    with pytest.raises(TypeError, match="a Start has no diag; expected a KasaStart"):
        Kasa(base.weight.detach(), starts())


def test_neat_is_its_formula():
    base = linear()
    adapter = VARIANTS["neat"].adapter(base.weight.detach(), starts())
    layer = PopulationLinear(base, adapter, MEMBERS)
    assert torch.equal(layer(rows()), base(rows()))
    shaken(adapter)
    W = base.weight.double()

    def reference(k):
        first = adapter.first[k].detach().double().T.requires_grad_()  # Θ₁ (n, r)
        second = adapter.second[k].detach().double().requires_grad_()
        both = (first.T, second)
        both[0].retain_grad()

        def run(x):
            update = torch.relu(W @ both[0].T) @ second
            return (x.double() @ (W + update).T + base.bias).float(), 0.0, both

        return run

    check(layer, [reference(k) for k in range(MEMBERS)], (adapter.first, adapter.second))


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_dash_launches_the_directions_that_changed_most():
    base = linear()
    adapter = VARIANTS["lora-dash"].adapter(base.weight.detach(), starts())
    layer = PopulationLinear(base, adapter, MEMBERS)
    Flat([p for group in adapter.groups.values() for p in group])  # as the optimiser has them
    shaken(adapter)
    adapter.delta.data.zero_()
    layer(rows()).square().sum().backward()
    assert not adapter.delta.grad.any() and adapter.lora.A.grad.any()
    plain = layer(rows()).detach()
    launch({NAME: layer})
    assert torch.equal(layer(rows()), plain)  # δ is 0
    adapter.delta.data += torch.linspace(-1, 1, 24).view(3, 8)
    W = base.weight.double()
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)

    def reference(k):
        A, B, delta = (
            p[k].detach().double().requires_grad_()
            for p in (adapter.lora.A, adapter.lora.B, adapter.delta)
        )
        rates = torch.stack([U[:, i] @ (B @ A) @ Vh[i] / sigma[i] for i in range(len(sigma))])
        top = rates.detach().abs().argsort(descending=True)[:8]

        def run(x):
            update = B @ A + U[:, top] * delta @ Vh[top]
            return (x.double() @ (W + update).T + base.bias).float(), 0.0, (A, B, delta)

        return run

    for p in (adapter.lora.A, adapter.lora.B, adapter.delta):
        p.grad = None
    parameters = (adapter.lora.A, adapter.lora.B, adapter.delta)
    check(layer, [reference(k) for k in range(MEMBERS)], parameters)
    adapter.load(starts())
    assert torch.equal(layer(rows()), base(rows())) and not adapter.left.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_population_starts_and_starts_again(name):
    its = context("llama")
    other = VARIANTS[name].starts(dataclasses.replace(its, seed=9))
    first = VARIANTS[name].starts(its)
    model = its.load()
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    reference = base
    if name == "kasa":
        with torch.no_grad():
            reference = adapted(its, "kasa")(input_ids=ids).logits
    population = Population(model, [first, other], VARIANTS[name].adapter)
    twice = torch.cat([ids, ids])
    both = [model(input_ids=twice).logits]
    torch.testing.assert_close(both[0], torch.cat([reference, reference]), atol=1e-4, rtol=1e-4)
    values = {group: flat.values.clone() for group, flat in population.flat.items()}
    for layer in population.layers.values():
        shaken(layer.adapter)
    launch(population.layers)
    assert not torch.allclose(model(input_ids=twice).logits, both[0], atol=1e-2)
    population.load([first, other])
    both.append(model(input_ids=twice).logits)
    assert torch.equal(*both)
    for group, flat in population.flat.items():
        assert torch.equal(flat.values, values[group])
    population.close()


def _trained(method: str, steps: int, device: str = "cpu"):
    """The adapters of one member after so many steps, by layer; the texts are of two lengths."""
    of_text = context("llama")
    generator = torch.Generator().manual_seed(0)
    rows = [(x, x) for x in torch.randint(1, models.VOCAB, (16, 12), generator=generator)]
    rows += [(x[:5], x[:5]) for x, _ in rows[8:]]
    variant = VARIANTS[method]
    model = of_text.load().to(device).requires_grad_(False)
    population = Population(model, [variant.starts(of_text)], variant.adapter)
    recipe = Recipe(steps=steps, batch_size=4, warmup=1)
    train_population(population, CausalTask("t", rows, rows), [Member(method, 1e-2)], recipe)
    adapters = {name: layer.adapter for name, layer in population.layers.items()}
    population.close()
    return adapters


def test_training_launches_lora_dash_and_adds_kasas_penalty(monkeypatch):
    for adapter in _trained("lora-dash", 5).values():  # launched after two
        assert bool(adapter.left.any()) and bool((adapter.delta != 0).all())
    with_it = _trained("kasa", 2)
    monkeypatch.setattr("effect.runs.penalties", lambda layers: None)
    without = _trained("kasa", 2)
    for name, adapter in with_it.items():
        assert not torch.equal(adapter.lora.A, without[name].lora.A)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", VARIANTS)
def test_batches_of_another_length_are_captured_while_training(name):
    for layer, adapter in _trained(name, 6, "cuda").items():
        for group in adapter.groups.values():
            assert all(bool(p.isfinite().all()) for p in group), layer
