"""Moments of layers against sums over single tokens, and what a context finds and refuses."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from contexts import KINDS, RANK, batches, context, kept, task

import oracle
from effect.moments import as_one_sample, counted_tokens, task_moments
from filet_kernels import fisher_energies
from models import case, observe, weight_of


def close(actual, expected):
    """The model runs in float32. Measured: up to 2e-6."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == torch.float64 and error < 1e-5, float(error)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_sums_over_tokens(kind):
    its = task(kind)
    seen, terms = observe(its.model, its.targets, its.samples, its.shift)
    keep, _ = observe(its.model, its.targets, kept(kind), its.shift)
    for name in its.targets:
        (x, g), found = seen[name], context(kind).moments[name]
        S_X = sum(torch.outer(row, row) for row in x) / len(x)
        S_Y = sum(torch.outer(row, row) for row in g) / len(g)
        G = sum(torch.outer(b, a) for a, b in zip(x, g, strict=True)) / terms
        for actual, expected in ((found.S_X, S_X), (found.S_Y, S_Y), (found.G, G)):
            close(actual, expected)
        x0 = keep[name][0]
        close(context(kind).keep_moments[name], x0.T @ x0 / len(x0))


def test_layers_of_one_input_share_its_moment():
    moments = context("llama").moments
    block = "model.layers.0."
    q, k, v, o = (moments[f"{block}self_attn.{x}_proj"].S_X for x in "qkvo")
    gate, up, down = (moments[f"{block}mlp.{x}_proj"].S_X for x in ("gate", "up", "down"))
    assert q is k is v and gate is up
    assert len({id(x) for x in (q, o, gate, down)}) == 4
    assert moments["model.layers.1.self_attn.q_proj"].S_X is not q


@pytest.mark.parametrize("kind", KINDS)
def test_the_librarys_statistics_are_of_the_same_data(kind):
    its, found = task(kind), context(kind)
    seen, terms = observe(its.model, its.targets, its.samples, its.shift)
    for name, (x, g) in seen.items():
        W = weight_of(its.model, name)
        energies = fisher_energies(W, found.statistics.moments[name])
        truth = oracle.fisher_energies(W, x, g / terms)
        assert ((energies - truth).abs() / truth).max() < 1e-3, name


@pytest.mark.parametrize("kind", ["bert class", "bert tokens", "bert masked"])
def test_a_mask_leaves_padding_out_whatever_the_labels_are(kind):
    its = case(kind)
    targets = [t for t in its.targets if ".attention." in t]
    model = copy.deepcopy(its.model).eval().requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in targets}
    found = task_moments(model, layers, batches(its.samples))
    seen, terms = observe(its.model, targets, its.samples)
    for name, (x, g) in seen.items():
        close(found[name].S_X, x.T @ x / len(x))
        close(found[name].S_Y, g.T @ g / len(g))
        close(found[name].G, g.T @ x / terms)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_as_one_sample_the_model_computes_the_same(kind):
    its, found = task(kind), context(kind)
    batch = found.batches[0]
    counted, shapes = counted_tokens(batch), []
    model = found.load()
    with torch.no_grad():
        expected = model(**batch).logits
        layers = found.layers_of(model)
        hooks = [
            layer.register_forward_hook(lambda module, args, y: shapes.append(args[0].shape))
            for layer in layers.values()
        ]
        with as_one_sample(layers, counted):
            actual = model(**batch).logits
    rows = slice(None) if counted is None else counted
    assert torch.allclose(actual[rows], expected[rows], atol=1e-5)
    tokens = 4 * 5 if counted is None else int(counted.sum())  # images: 4 patches and a class
    assert len(shapes) == len(its.targets)
    assert all(shape[:2] == (1, tokens) for shape in shapes)
    for hook in hooks:
        hook.remove()
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers.values())


def test_targets_are_endings_of_names():
    found = dataclasses.replace(context("llama"), targets=["q_proj", "model.layers.1.mlp.up_proj"])
    assert list(found.layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert found.config().r == found.config().lora_alpha == RANK
    with pytest.raises(ValueError, match=r"targets=\['proj'\] are no linear layers of this Llama"):
        dataclasses.replace(found, targets=["proj"]).weights  # noqa: B018


def test_a_contrast_needs_data_to_keep():
    with pytest.raises(ValueError, match="keep=None; expected batches"):
        dataclasses.replace(context("llama"), keep=None).keep_moments  # noqa: B018


def test_a_loss_of_ones_own():
    calls = []

    def halved(model, batch):
        calls.append(len(batch["labels"]))
        return model(**batch).loss / 2, int((batch["labels"][:, 1:] != -100).sum())

    found = dataclasses.replace(context("llama"), loss_fn=halved)
    for name, its in found.moments.items():
        close(its.G, context("llama").moments[name].G / 2)
        close(its.S_X, context("llama").moments[name].S_X)
    assert calls == [4, 4, 4]
    name = "model.layers.0.mlp.up_proj"
    W = found.weights[name]
    energies, whole = (
        fisher_energies(W, c.statistics.moments[name]) for c in (found, context("llama"))
    )
    assert torch.allclose(4 * energies, whole, rtol=1e-4)
