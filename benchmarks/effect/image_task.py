"""Images to be told apart: rows, batches, and a population's losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effect.loss import Losses, class_losses
from effect.tasks import Row

__all__ = ["ClassTask", "pixels", "read_images"]

# ImageNet's, of red, green and blue.
_MEAN = (0.485, 0.456, 0.406)
_SPREAD = (0.229, 0.224, 0.225)


def pixels(images: Tensor, side: int) -> Tensor:
    """(N, 3, side, side) float32 of grey images (N, h, w) uint8, on their device.

    Resized bilinearly, three equal channels, each normalised as the model's were.
    """
    grey = images.unsqueeze(1).float().div_(255)
    grey = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
    # By numbers, not by a tensor of them: that would be copied while a graph is captured.
    return torch.cat([(grey - m) / s for m, s in zip(_MEAN, _SPREAD, strict=True)], 1)


def read_images(path: Path, limit: int | None = None, first: int = 0) -> list[Row]:
    """Rows of a file with ``images`` (N, h, w) uint8 and ``labels`` (N,), which begin at first."""
    with np.load(path) as file:
        images, labels = (torch.from_numpy(file[name][:limit]) for name in ("images", "labels"))
    if images.dtype != torch.uint8 or images.dim() != 3:
        raise ValueError(
            f"images of {path} are {images.dtype} {tuple(images.shape)}; expected uint8 (N, h, w)"
        )
    return list(zip(images, labels.long() + first, strict=True))


@dataclass
class ClassTask:
    """One data set's images through its classes of a frozen head; others measure what is kept.

    Rows are an image (h, w) uint8 and its class, a number among all classes of the head. Of the
    loss of a row, only the classes of its own data set are part.

    Attributes:
        head: a linear layer of float32 for all data sets. The model's own is nn.Identity, so that
            its logits are what the head gets.
        groups: (classes,) the data set of every class, on the head's device.
    """

    name: str
    train: list[Row]
    test: list[Row]
    general: list[Row]
    head: nn.Linear
    groups: Tensor
    keep: list[Row] = field(default_factory=list)

    def batch(self, rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        images = torch.stack([image for image, _ in rows])
        labels = torch.stack([label for _, label in rows])
        return {"images": images.to(device, non_blocking=True)}, labels

    def run(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(pixel_values=pixels(inputs["images"], model.config.image_size)).logits

    def losses(
        self, model: Any, output: Tensor, labels: Tensor, members: int, asked: bool
    ) -> Losses:
        logits = self.head(output.to(self.head.weight.dtype))
        return class_losses(logits, labels, members, self.groups, asked)
