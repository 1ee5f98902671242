"""The identities against Algorithm 1 in float64, on a real model and real text."""

import accuracy
import pytest
import torch

import smollm2


@pytest.fixture(scope="module")
def folder():
    return smollm2.prepare()


def test_every_layer_of_smollm2_selects_the_same_directions(folder, device):
    peft_model, data = accuracy.prepare(folder, torch.bfloat16, device)
    layers = list(accuracy.compare(peft_model, data, fast=False))
    assert len(layers) == 210
    errors = {layer.name: layer.error("accurate") for layer in layers}
    assert max(errors.values()) <= 3e-3, max(errors.items(), key=lambda item: item[1])
    differing = {layer.name: layer.differing("accurate") for layer in layers}
    assert not any(differing.values()), {name: n for name, n in differing.items() if n}


def test_every_energy_of_smollm2_in_float32(folder, device):
    peft_model, data = accuracy.prepare(folder, torch.float32, device)
    errors = {
        layer.name: layer.worst_error("accurate")
        for layer in accuracy.compare(peft_model, data, fast=False)
    }
    assert len(errors) == 210
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])
