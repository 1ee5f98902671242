"""K adapters on one frozen model, in one forward and backward.

For member k and a layer y = W x + b, with its own factors,
    y_k = W x_k + b + (B_k A_k − B0_k A0_k) x_k.
The base product of all members is one matrix product over K times the rows; the adapters add to it
by batched products. A0 and B0 are what an initialisation has subtracted from W. Here they stay
beside W, in the same product as what trains: at the start [B, −B0] [A; A0] cancels in the
accumulator, and W stays the same for all.

A small model leaves a GPU idle: one run of SmolLM2-135M waits for kernels to be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effect.start import Start

__all__ = ["Adapter", "Lora", "PopulationLinear", "populated"]


class Adapter(Protocol):
    """The adapters of K members over one layer, as the layer and the optimiser see them.

    ``groups`` has the trained parameters, of shape (K, ...) and float32, under the name of what
    they are to the learning rate: "A", or "B" for what LoRA+ trains faster.
    """

    groups: dict[str, list[nn.Parameter]]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (K, R, n), B (K, m, R), and gain (K, m) or None, differentiable by the parameters.

        y_k = gain_k ⊙ (W x_k) + B_k A_k x_k + b.
        """
        ...


class Lora(nn.Module):
    """A and B of every member, and beside them what their starts subtract."""

    def __init__(self, weight: Tensor, starts: Sequence[Start]) -> None:
        super().__init__()
        self.A = nn.Parameter(_stacked([start.A for start in starts], weight.device))
        self.B = nn.Parameter(_stacked([start.B for start in starts], weight.device))
        self.groups = {"A": [self.A], "B": [self.B]}
        rest = max((0 if s.A0 is None else s.A0.shape[0] for s in starts), default=0)
        (m, n), K = weight.shape, len(starts)
        self.A0, self.B0 = weight.new_zeros(K, rest, n), weight.new_zeros(K, m, rest)
        for k, start in enumerate(starts):
            if start.A0 is not None and start.B0 is not None:
                self.A0[k, : start.A0.shape[0]] = start.A0
                self.B0[k, :, : start.A0.shape[0]] = -start.B0

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.A0.shape[1]:
            A, B = torch.cat([A, self.A0], 1), torch.cat([B, self.B0], 2)
        return A, B, None


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([tensor.to(device, torch.float32) for tensor in tensors])


class _Product(torch.autograd.Function):
    """W x_k + B_k A_k x_k, x (K, T, n); nothing is kept but x, its r products and the factors.

    The adapter's part is added where the base's lies, by the product itself: of a layer of a small
    model, reading and writing y once more takes as long as the base's product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        z = torch.bmm(x, A.mT)
        y = F.linear(x, W, bias)
        y.baddbmm_(z, B.mT)
        ctx.save_for_backward(x, W, A, B, z)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, z = ctx.saved_tensors
        gz = torch.bmm(g, B)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = g @ W
            gx.baddbmm_(gz, A)
        return gx, None, None, torch.bmm(gz.mT, x), torch.bmm(g.mT, z)


class PopulationLinear(nn.Module):
    """A frozen linear layer with K adapters. Rows come by member: x (K · b, ..., n)."""

    def __init__(self, base: nn.Linear, adapter: Any, members: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapter, self.members = adapter, members

    def forward(self, x: Tensor) -> Tensor:
        A, B, gain = self.adapter.factors(self.weight.dtype)
        rows = x.reshape(self.members, -1, x.shape[-1])
        if gain is None:
            y = _Product.apply(rows, self.weight, self.bias, A, B)
        else:
            base = F.linear(rows, self.weight) * gain.unsqueeze(1)
            y = torch.baddbmm(base, torch.bmm(rows, A.mT), B.mT)
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def populated(
    model: nn.Module,
    starts: Sequence[Mapping[str, Start]],
    adapter: Any = Lora,
) -> Iterator[dict[str, PopulationLinear]]:
    """Inside, the layers that ``starts`` name are ones of ``len(starts)`` members.

    Args:
        model: any model of nn.Linear layers, frozen, in the dtype to compute in.
        starts: of every member, by module name; all members name the same modules.
        adapter: ``adapter(W, starts of this layer)`` → :class:`Adapter`.

    Yields the layers by name. The model comes back with its own.
    """
    names = list(starts[0])
    for k, one in enumerate(starts):
        if list(one) != names:
            odd = sorted(set(one) ^ set(names))[:1] or "their order"
            raise ValueError(f"member {k} starts other modules than member 0: {odd}")
    layers: dict[str, PopulationLinear] = {}
    bases: dict[str, nn.Linear] = {}
    try:
        for name in names:
            base = model.get_submodule(name)
            if type(base) is not nn.Linear:
                raise TypeError(f"{name} is a {type(base).__name__}; expected nn.Linear")
            own = adapter(base.weight.detach(), [one[name] for one in starts])
            layers[name], bases[name] = PopulationLinear(base, own, len(starts)), base
            model.set_submodule(name, layers[name])
        yield layers
    finally:
        for name, base in bases.items():
            model.set_submodule(name, base)
