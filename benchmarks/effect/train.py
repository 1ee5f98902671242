"""Fine-tuning of a population: AdamW, clip and schedule of every member by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effect.population import PopulationLinear

__all__ = ["Member", "Optimizer", "Recipe"]


@dataclass(frozen=True)
class Member:
    """A run: an initialisation, its magnitude, and what trains it.

    Attributes:
        method: a name of :data:`effect.inits.START`.
        scale: by which A and B are multiplied at the start, each.
        rate: the peak learning rate.
        ratio: the rate of B over that of A (LoRA+).
        decay: AdamW's decoupled weight decay.
        seed: of a random start, of the calibration samples, and of the order of the data.
    """

    method: str
    rate: float
    scale: float = 1.0
    ratio: float = 1.0
    decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """What is the same for all: linear warm-up, linear decay to 0, AdamW, clip by the norm."""

    steps: int = 250
    batch_size: int = 16
    warmup: int = 15
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def factor(self, step: int) -> float:
        """Of the rate in the step of this number, from 0."""
        return min((step + 1) / self.warmup, 1.0) * (1 - step / self.steps)


class Optimizer:
    """torch's AdamW and clip_grad_norm_ for K members at once, each with a rate of its own.

    The members' parameters become views of a few (K, D) tensors, and so do their gradients: what
    differs from member to member is then one factor a row.
    """

    def __init__(
        self, layers: Mapping[str, PopulationLinear], members: Sequence[Member], recipe: Recipe
    ) -> None:
        self.recipe = recipe
        self.parts: list[_Part] = []
        column = {"dtype": torch.float32, "device": next(iter(layers.values())).weight.device}
        rates = torch.tensor([[m.rate] for m in members], **column)
        ratios = torch.tensor([[m.ratio] for m in members], **column)
        decays = torch.tensor([[m.decay] for m in members], **column)
        for group in ("A", "B"):
            found = [p for layer in layers.values() for p in layer.adapter.groups.get(group, ())]
            if found:
                self.parts.append(_Part(found, rates * ratios if group == "B" else rates, decays))
        self.done = 0

    @torch.no_grad()
    def step(self) -> None:
        """Clip, move every parameter, and leave gradients of 0."""
        beta1, beta2 = self.recipe.betas
        squares = [torch.linalg.vector_norm(p.gradient, dim=1).square_() for p in self.parts]
        norm = torch.stack(squares).sum(0).sqrt_()
        clip = (self.recipe.clip / (norm + 1e-6)).clamp_(max=1).unsqueeze(1)
        factor = self.recipe.factor(self.done)
        self.done += 1
        first, second = 1 - beta1**self.done, math.sqrt(1 - beta2**self.done)
        for part in self.parts:
            g = part.gradient.mul_(clip)
            part.mean.lerp_(g, 1 - beta1)
            part.square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            rate = part.rates * factor
            part.values.mul_(1 - rate * part.decays)
            update = part.square.sqrt().div_(second).add_(self.recipe.eps)
            torch.div(part.mean, update, out=update)
            part.values.sub_(update.mul_(rate / first))
            g.zero_()


class _Part:
    """Parameters of one kind, flat, with what AdamW keeps of them."""

    def __init__(self, parameters: Iterable[nn.Parameter], rates: Tensor, decays: Tensor) -> None:
        parameters = list(parameters)
        members = len(rates)
        width = sum(p[0].numel() for p in parameters)
        self.values = rates.new_empty(members, width)
        self.gradient, self.mean, self.square = (torch.zeros_like(self.values) for _ in range(3))
        self.rates, self.decays = rates, decays
        start = 0
        for p in parameters:
            part = slice(start, start + p[0].numel())
            self.values[:, part] = p.detach().reshape(members, -1)
            p.data = self.values[:, part].view(p.shape)
            p.grad = self.gradient[:, part].view(p.shape)
            start = part.stop
