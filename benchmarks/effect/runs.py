"""A population from its start to its result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effect.loss import Losses
from effect.population import Population
from effect.tasks import Row, Task, order
from effect.train import Member, Optimizer, Recipe
from effect.variants import launch, penalties
from filet.model.batch import IGNORED

__all__ = ["Result", "evaluate", "train_population"]


@dataclass(frozen=True)
class Result:
    """What became of a member: nats per labelled token, and the share of right choices.

    ``middle`` is the test loss after two fifths of the steps. NaN where there is none.
    """

    loss: float
    middle: float
    general: float
    accuracy: float
    losses: list[float]  # of the batches it was trained on


@torch.no_grad()
def evaluate(
    population: Population, task: Task, rows: Sequence[Row], batch_size: int, asked: bool = False
) -> tuple[list[float], list[float]]:
    """Mean loss over all labels of ``rows`` and share of right ones, of every member.

    NaN where there are no rows, or none was ``asked``.
    """
    members = population.members
    nothing = members * [math.nan]
    if not rows:
        return nothing, nothing
    ordered = sorted(rows, key=lambda row: len(row[0]))
    # The last batch is filled up with rows that do not count: one shape more would be captured.
    blank = [(ids, torch.full_like(labels, IGNORED)) for ids, labels in ordered[:1]]
    ordered = (-len(ordered) % batch_size) * blank + ordered
    found: list[Losses] = []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        inputs, labels = task.batch(members * part, population.device)
        output = population.run(task, inputs)
        found.append(task.losses(population.model, output, labels, members, asked))
    terms = sum(one.terms[0] for one in found)
    means = torch.stack([one.sums for one in found]).double().sum(0) / terms
    right = [one.right for one in found if one.right is not None]
    shares = (torch.stack(right).sum(0) / len(rows)).tolist() if right else nothing
    return means.tolist(), shares


def train_population(
    population: Population, task: Task, members: Sequence[Member], recipe: Recipe
) -> list[Result]:
    """Fine-tune a population from where it is, ``members`` saying how, and test it.

    Members of one seed see the same batches in the same order.
    """
    if len(members) != population.members:
        raise ValueError(f"{len(members)} members; expected {population.members}, the population's")
    orders = {
        seed: order(task.train, seed, recipe.batch_size, recipe.steps)
        for seed in {member.seed for member in members}
    }
    curve: list[Tensor] = []
    middle: list[float] = []
    with warnings.catch_warnings():
        # The parameters are rows of a few large tensors, and so are their gradients.
        warnings.filterwarnings("ignore", "grad and param do not obey")
        optimizer = Optimizer(population, members, recipe)
        longest = max((*task.train, *task.test, *task.general), key=lambda row: len(row[0]))
        population.expect(task, len(members) * recipe.batch_size * [longest])
        for step in range(recipe.steps):
            rows = [row for member in members for row in orders[member.seed][step]]
            inputs, labels = task.batch(rows, population.device)
            output = population.run(task, inputs)
            losses = task.losses(population.model, output, labels, len(members), False).means
            extra = penalties(population.layers)
            (losses.sum() if extra is None else (losses + extra).sum()).backward()
            del extra  # its graph holds parameters: CUDA refuses to capture another shape beside it
            optimizer.step()
            curve.append(losses.detach())
            if step + 1 == max(1, recipe.steps * 2 // 5):
                middle, _ = evaluate(population, task, task.test, recipe.batch_size)
                launch(population.layers)
    size = recipe.batch_size
    loss, accuracy = evaluate(population, task, task.test, size, asked=True)
    general, _ = evaluate(population, task, task.general, size)
    by_member = torch.stack(curve, 1).tolist()
    return [Result(*of) for of in zip(loss, middle, general, accuracy, by_member, strict=True)]
