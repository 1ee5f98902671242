"""Whether a class of linear modules multiplies by its weight, as torch's own does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["is_product"]

_SIZE = 64  # of the weight that is tried; quantisers take it in groups of 32, say

# Of the largest difference to x Wᵀ + b over the largest of that, in float32 both; 8 bits give 0.01.
_ROUNDING = 1e-4


@torch.no_grad()
def is_product(module: nn.Module) -> bool:
    """Whether the forward of a module derived from ``nn.Linear`` or ``Conv1D`` is x Wᵀ + b.

    That of its class, where it is one of torch's or transformers', else as it is tried: on a copy
    of the module with small numbers for its weight and bias. A layer that rounds its weight or its
    input (BitNet's, a quantisation-aware one), or adds to their product, is not: energies of its
    stored weight would be those of a W that it does not multiply by. False also for a forward that
    fails on such a copy, and True for what returns no tensor: that is refused when it is called.
    Nothing is mutated, and the state of random numbers is what it was.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight, bias, x = _numbers(_SIZE, _SIZE), _numbers(_SIZE), _numbers(4, _SIZE)
    expected = x @ (weight if isinstance(module, Conv1D) else weight.T)
    try:
        tried: Any = copy.copy(module)
        # Whatever it keeps to itself is a copy's: a quantiser may note the range of what it sees.
        tried._modules, tried._buffers = copy.deepcopy((module._modules, module._buffers))
        tried._parameters = dict(module._parameters) | {"weight": weight}
        tried.nf = _SIZE  # what Conv1D's forward asks for
        if module._parameters.get("bias") is not None:
            tried._parameters["bias"] = bias
            expected = expected + bias
        with torch.random.fork_rng(devices=[]):
            found = type(module).forward(tried, x)
    except Exception:  # of as many kinds as there are forwards
        return False
    if not isinstance(found, Tensor):
        return True  # Llama 4's router: with LoRA it fails in any case, and the pass says by what
    if found.shape != expected.shape:
        return False
    return bool((found.float() - expected).abs().max() <= _ROUNDING * expected.abs().max())


def _numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
