"""A population from its start to its result."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effect.loss import Losses
from effect.population import Lora, populated
from effect.start import Start
from effect.tasks import Row, Task, order
from effect.train import Member, Optimizer, Recipe
from filet.model.fused import fused

__all__ = ["Result", "evaluate", "train_population"]

_EVALUATED = 16  # rows of each member in a batch


@dataclass(frozen=True)
class Result:
    """What became of a member: nats per labelled token, and the share of right choices.

    ``middle`` is the test loss after two fifths of the steps.
    """

    loss: float
    middle: float
    general: float | None
    accuracy: float | None
    losses: list[float]  # of the batches it was trained on


@torch.no_grad()
def evaluate(
    model: Any, task: Task, rows: Sequence[Row], members: int, asked: bool = False
) -> tuple[list[float], list[float] | None]:
    """Mean loss over all labels of ``rows`` and share of right ones, of every member."""
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row[0]))
    found: list[Losses] = []
    for start in range(0, len(ordered), _EVALUATED):
        part = ordered[start : start + _EVALUATED]
        batch = task.batch([row for _ in range(members) for row in part], device)
        found.append(task.losses(model, batch, members, asked))
    terms = sum(one.terms[0] for one in found)
    means = torch.stack([one.sums for one in found]).double().sum(0) / terms
    right = [one.right for one in found if one.right is not None]
    shares = None if not right else (torch.stack(right).sum(0) / len(rows)).tolist()
    return means.tolist(), shares


def train_population(
    model: Any,
    task: Task,
    starts: Sequence[Mapping[str, Start]],
    members: Sequence[Member],
    recipe: Recipe,
    adapter: Any = Lora,
) -> list[Result]:
    """Fine-tune ``members`` from ``starts`` side by side, and test them.

    ``model`` is frozen and comes back as it was. Members of one seed see the same batches in the
    same order. Deterministic on the same machine.
    """
    device, count = next(model.parameters()).device, len(members)
    orders = {
        seed: order(task.train, seed, recipe.batch_size, recipe.steps)
        for seed in {member.seed for member in members}
    }
    curve: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # The parameters are rows of a few large tensors, and so are their gradients.
        warnings.filterwarnings("ignore", "grad and param do not obey")
        stack.enter_context(fused(model))
        layers = stack.enter_context(populated(model, starts, adapter))
        optimizer = Optimizer(layers, members, recipe)
        middle: list[float] = []
        for step in range(recipe.steps):
            rows = [row for member in members for row in orders[member.seed][step]]
            losses = task.losses(model, task.batch(rows, device), count, False).means
            losses.sum().backward()
            optimizer.step()
            curve.append(losses.detach())
            if step + 1 == max(1, recipe.steps * 2 // 5):
                middle, _ = evaluate(model, task, task.test, count)
        loss, accuracy = evaluate(model, task, task.test, count, asked=True)
        general = evaluate(model, task, task.general, count)[0] if task.general else None
    by_member = torch.stack(curve, 1).tolist()
    return [
        Result(
            loss[k],
            middle[k],
            None if general is None else general[k],
            None if accuracy is None else accuracy[k],
            by_member[k],
        )
        for k in range(count)
    ]
