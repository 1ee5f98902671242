"""Images to be told apart, as a file holds them and as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification

from effect.tasks import Row

__all__ = ["Images", "pixels"]

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


class Images:
    """Samples are (h, w) uint8; files have ``images`` (N, h, w) uint8 and ``labels`` (N,)."""

    loads: Any = AutoModelForImageClassification

    def __init__(self, config: Any, device: torch.device) -> None:
        self.side = config.image_size

    def read(self, path: Path, limit: int | None) -> list[Row]:
        with np.load(path) as file:
            images, labels = (torch.from_numpy(file[name][:limit]) for name in ("images", "labels"))
        if images.dtype != torch.uint8 or images.dim() != 3:
            raise ValueError(
                f"images of {path} are {images.dtype} {tuple(images.shape)}; expected uint8 "
                "(N, h, w)"
            )
        return list(zip(images, labels.long(), strict=True))

    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"images": torch.stack(list(samples))}

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pixel_values": pixels(inputs["images"], self.side)}
