"""Samples to be told apart: rows, batches, and a population's losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effect.loss import Losses, class_losses
from effect.tasks import Row

__all__ = ["ClassTask", "Form"]


class Form(Protocol):
    """What the samples of a classifier are. Made from the model's config, and for a device.

    Attributes:
        loads: the class whose ``from_pretrained`` makes the model, with a linear ``classifier``.
    """

    loads: Any

    def __init__(self, config: Any, device: torch.device) -> None: ...

    def read(self, path: Path, limit: int | None) -> list[Row]:
        """Of a file, the first ``limit`` samples and their classes, numbered from 0."""
        ...

    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        """On the CPU, no larger than need be: this is what goes to the device."""
        ...

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the model, from a batch on its device. On a GPU it is captured in a graph."""
        ...


@dataclass
class ClassTask:
    """One data set's samples through its classes of a frozen head; others measure what is kept.

    Rows are a sample and its class, a number among all classes of the head. Of the loss of a row,
    only the classes of its own data set are part.

    Attributes:
        form: of the samples.
        head: a linear layer of float32 for all data sets. The model's own is nn.Identity, so that
            its logits are what the head gets.
        groups: (classes,) the data set of every class, on the head's device.
    """

    name: str
    form: Form
    train: list[Row]
    test: list[Row]
    general: list[Row]
    head: nn.Linear
    groups: Tensor
    keep: list[Row] = field(default_factory=list)

    def batch(self, rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        inputs = self.form.batch([sample for sample, _ in rows])
        labels = torch.stack([label for _, label in rows])
        return {key: x.to(device, non_blocking=True) for key, x in inputs.items()}, labels

    def run(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(**self.form.arguments(inputs)).logits

    def losses(
        self, model: Any, output: Tensor, labels: Tensor, members: int, asked: bool
    ) -> Losses:
        logits = self.head(output.to(self.head.weight.dtype))
        return class_losses(logits, labels, members, self.groups, asked)
