"""Fine-tuning of a population: AdamW, clip and schedule of every member by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effect.population import Flat, Population

__all__ = ["FROZEN", "Member", "Optimizer", "Recipe"]

FROZEN = ".frozen"  # ends the name of a method of whose A and B only B trains


@dataclass(frozen=True)
class Member:
    """A run: an initialisation, its magnitude, and what trains it.

    Attributes:
        method: a name of :data:`effect.inits.START`. Where it ends in ".frozen", only B trains.
        scale: by which A and B are multiplied at the start, each.
        rate: the peak learning rate.
        ratio: the rate of B over that of A (LoRA+).
        decay: AdamW's decoupled weight decay.
        seed: of a random start and of the order of the data.
    """

    method: str
    rate: float
    scale: float = 1.0
    ratio: float = 1.0
    decay: float = 0.0
    seed: int = 0

    @property
    def frozen(self) -> bool:
        """Whether A stays where it starts."""
        return self.method.endswith(FROZEN)


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

    A population's parameters are rows of a few (K, D) tensors: what differs from member to member
    is one factor a row. A frozen member's A has no part in its norm.
    """

    def __init__(self, population: Population, members: Sequence[Member], recipe: Recipe) -> None:
        self.recipe = recipe
        self.parts = [_Part(flat, members, group == "B") for group, flat in population.flat.items()]
        self.done = 0

    @torch.no_grad()
    def step(self) -> None:
        """Clip, move every parameter, and leave gradients of 0."""
        beta1, beta2 = self.recipe.betas
        for part in self.parts:
            if len(part.still):
                part.flat.gradient.index_fill_(0, part.still, 0)
        squares = [torch.linalg.vector_norm(p.flat.gradient, dim=1).square_() for p in self.parts]
        norm = torch.stack(squares).sum(0).sqrt_()
        clip = (self.recipe.clip / (norm + 1e-6)).clamp_(max=1).unsqueeze(1)
        factor = self.recipe.factor(self.done)
        self.done += 1
        first, second = 1 - beta1**self.done, math.sqrt(1 - beta2**self.done)
        for part in self.parts:
            values, g = part.flat.values, part.flat.gradient.mul_(clip)
            part.mean.lerp_(g, 1 - beta1)
            part.square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            rate = part.rates * factor
            values.mul_(1 - rate * part.decays)
            update = part.square.sqrt().div_(second).add_(self.recipe.eps)
            torch.div(part.mean, update, out=update)
            values.sub_(update.mul_(rate / first))
            g.zero_()


class _Part:
    """What AdamW knows of parameters of one kind: two averages, and of every member a rate."""

    def __init__(self, flat: Flat, members: Sequence[Member], faster: bool) -> None:
        self.flat = flat
        self.mean, self.square = torch.zeros_like(flat.values), torch.zeros_like(flat.values)
        still = [k for k, m in enumerate(members) if m.frozen and not faster]
        self.still = torch.tensor(still, dtype=torch.long, device=flat.values.device)
        rates = [[m.rate * m.ratio if faster else m.rate] for m in members]
        self.rates = torch.tensor(rates).to(flat.values).index_fill_(0, self.still, 0)
        self.decays = torch.tensor([[m.decay] for m in members]).to(flat.values)
