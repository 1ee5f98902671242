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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effect.start import Start
from filet.model.fused import fused

__all__ = ["Adapter", "Flat", "Lora", "Population", "PopulationLinear"]


class Adapter(Protocol):
    """The adapters of K members over one layer, as the layer and the optimiser see them.

    ``groups`` has the trained parameters, of shape (K, ...) and float32, under the name of what
    they are to the learning rate: "A", or "B" for what LoRA+ trains faster.
    """

    groups: dict[str, list[nn.Parameter]]

    def load(self, starts: Sequence[Start]) -> None:
        """Start again elsewhere, in place."""
        ...

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (K, R, n), B (K, m, R), and gain (K, m) float32 or None, differentiable.

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
        self.load(starts)

    @torch.no_grad()
    def load(self, starts: Sequence[Start]) -> None:
        """Start again elsewhere, in place. The shapes stay."""
        self.A0.zero_()
        self.B0.zero_()
        for k, start in enumerate(starts):
            self.A[k], self.B[k] = start.A, start.B
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
            # In float32: near 1, bfloat16 has steps of 2⁻⁷, more than a gain moves in training.
            base = (F.linear(rows, self.weight) * gain.unsqueeze(1)).to(rows.dtype)
            y = torch.baddbmm(base, torch.bmm(rows, A.mT), B.mT)
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Flat:
    """Parameters (K, ...) made rows of one tensor, and their gradients of another.

    Attributes:
        values, gradient: (K, D) float32. The parameters and their ``grad`` are views of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        members, widths = len(parameters[0]), [p[0].numel() for p in parameters]
        self.values = parameters[0].detach().new_empty(members, sum(widths))
        self.gradient = torch.zeros_like(self.values)
        parts = (self.values.split(widths, 1), self.gradient.split(widths, 1))
        for p, value, gradient in zip(parameters, *parts, strict=True):
            value.copy_(p.detach().reshape(members, -1))
            p.data, p.grad = value.view(p.shape), gradient.view(p.shape)


class Population:
    """K members in a model's layers, and the model's forward and backward of all of them.

    On a GPU both are captured once for every shape of inputs and replayed: some 3000 kernels of 20
    to 100 µs a step are launched by Python in 250 to 350 ms, and run in 150 (SmolLM2-135M, K = 16,
    one H100).

    Args:
        model: any model of nn.Linear layers, frozen, in the dtype to compute in.
        starts: of every member, by module name; all members name the same modules.
        adapter: ``adapter(W, starts of this layer)`` → :class:`Adapter`.

    ``layers`` has them by name, ``flat`` their parameters by group. :meth:`close` gives the model
    its own back.
    """

    def __init__(
        self, model: nn.Module, starts: Sequence[Mapping[str, Start]], adapter: Any = Lora
    ) -> None:
        names = _names(starts)
        self.model, self.members = model, len(starts)
        self.device = next(model.parameters()).device
        self.layers: dict[str, PopulationLinear] = {}
        self._bases: dict[str, nn.Linear] = {}
        self._captured: dict[Any, _Captured] = {}
        self._graphs: _Graphs | None = None
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(fused(model))
        for name in names:
            base = model.get_submodule(name)
            if type(base) is not nn.Linear:
                self.close()
                raise TypeError(f"{name} is a {type(base).__name__}; expected nn.Linear")
            own = adapter(base.weight.detach(), [one[name] for one in starts])
            self.layers[name], self._bases[name] = PopulationLinear(base, own, self.members), base
            model.set_submodule(name, self.layers[name])
        self.flat: dict[str, Flat] = {}
        for group in ("A", "B"):
            found = [p for x in self.layers.values() for p in x.adapter.groups.get(group, ())]
            if found:
                self.flat[group] = Flat(found)

    def load(self, starts: Sequence[Mapping[str, Start]]) -> None:
        """Start again with other members of the same shapes; what was captured stays."""
        if len(starts) != self.members or _names(starts) != list(self.layers):
            raise ValueError(f"expected {self.members} members of the same modules as before")
        for name, layer in self.layers.items():
            layer.adapter.load([one[name] for one in starts])

    def run(self, task: Any, inputs: dict[str, Tensor]) -> Tensor:
        """``task.run(model, inputs)``, differentiable by the members' parameters.

        What is returned is overwritten by the next call.
        """
        if self.device.type != "cuda":
            return task.run(self.model, inputs)
        key = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        if key not in self._captured:
            if self._graphs is None:
                self._graphs = _Graphs()
            self._captured[key] = _Captured(lambda x: task.run(self.model, x), inputs, self._graphs)
        return self._captured[key](inputs)

    def expect(self, task: Any, rows: Sequence[Any]) -> None:
        """Capture the largest batch first, in whose room all others fit: of ``rows``' longest."""
        if self.device.type == "cuda":
            longest = max(rows, key=lambda row: row[0].numel())
            self.run(task, task.batch(len(rows) * [longest], self.device)[0])

    def close(self) -> None:
        self._captured.clear()
        self._graphs = None
        self._stack.close()
        for name, base in self._bases.items():
            self.model.set_submodule(name, base)
        self._bases.clear()


def _names(starts: Sequence[Mapping[str, Start]]) -> list[str]:
    names = list(starts[0])
    for k, one in enumerate(starts):
        if list(one) != names:
            odd = sorted(set(one) ^ set(names))[:1] or "their order"
            raise ValueError(f"member {k} starts other modules than member 0: {odd}")
    return names


class _Graphs:
    """What all graphs of a population share: one stream, and the memory that they run in."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.memory = torch.cuda.MemPool()


class _Captured:
    """A function of tensors and its backward, as two CUDA graphs over places of their own."""

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        graphs: _Graphs,
    ) -> None:
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        graphs.stream.wait_stream(torch.cuda.current_stream())
        # Once without capturing: kernels are compiled, and libraries choose theirs. In the graphs'
        # memory, for beside it there is no room for another batch's activations.
        with torch.cuda.stream(graphs.stream), torch.enable_grad():
            with torch.cuda.use_mem_pool(graphs.memory):
                output = function(self.inputs)
            output.backward(torch.zeros_like(output))
            del output
        torch.cuda.current_stream().wait_stream(graphs.stream)
        torch.cuda.empty_cache()
        place: Any = {"pool": graphs.memory.id, "stream": graphs.stream}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.enable_grad(), torch.cuda.graph(self.forward, **place):
            self.output = function(self.inputs)
        self.gradient = torch.zeros_like(self.output)
        with torch.cuda.graph(self.backward, **place):
            self.output.backward(self.gradient)
        self.output = self.output.detach()
        self._needed = torch.zeros((), device=self.output.device, requires_grad=True)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        return _Replayed.apply(self, self._needed)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, needed: Tensor) -> Tensor:
        ctx.captured = captured
        captured.forward.replay()
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        ctx.captured.gradient.copy_(g)
        ctx.captured.backward.replay()
        return None, None
