"""The identities against Algorithm 1 in float64, on a real model and real text.

Of every third block; `make accuracy` prints the table of all.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import accuracy
import smollm2

EVERY, LAYERS = 3, 70
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class InFloat32(TorchDispatchMode):
    """Products of bfloat16 by those of float32, rounded once: what processors with such do.

    On others torch multiplies element by element, which took this test twenty minutes.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*(x.float() for x in args)).bfloat16()


def products(device):
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return InFloat32() if slow else contextlib.nullcontext()


@pytest.fixture(scope="module")
def folder():
    return smollm2.prepare()


def test_every_layer_of_smollm2_selects_the_same_directions(folder, device):
    peft_model, data = accuracy.prepare(folder, torch.bfloat16, device)
    with products(device):
        layers = list(accuracy.compare(peft_model, data, fast=False, every=EVERY))
    assert len(layers) == LAYERS
    errors = {layer.name: layer.error("accurate") for layer in layers}
    assert max(errors.values()) <= 3e-3, max(errors.items(), key=lambda item: item[1])
    differing = {layer.name: layer.differing("accurate") for layer in layers}
    assert not any(differing.values()), {name: n for name, n in differing.items() if n}


def test_every_energy_of_smollm2_in_float32(folder, device):
    peft_model, data = accuracy.prepare(folder, torch.float32, device)
    errors = {
        layer.name: layer.worst_error("accurate")
        for layer in accuracy.compare(peft_model, data, fast=False, every=EVERY)
    }
    assert len(errors) == LAYERS
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])
