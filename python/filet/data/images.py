"""Images, with classes or without, as a model's processor makes them, and these into batches."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from filet.data.sources import Source, draw
from filet.data.tasks import class_of, column_of

__all__ = ["Images", "images_of"]

_COLUMNS = (("image", "img"), ("label", "labels", "fine_label"))

_AT_ONCE = 16  # through the processor


@dataclass(frozen=True, eq=False)
class Images:
    """Images and the numbers of their classes, to be put into batches of any size.

    Attributes:
        rows: of every image its pixels, (channels, height, width) float32, and its class.
        labelled: whether classes count; batches have no ``labels`` where they do not.
    """

    rows: list[tuple[Tensor, int]]
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all pixels and classes, in their order."""
        found = hashlib.sha256()
        for pixels, label in self.rows:
            found.update(pixels.contiguous().numpy().tobytes() + label.to_bytes(8))
        return found.hexdigest()

    def share(self, rank: int, size: int) -> Images:
        """The images of one process of several: every ``size``-th."""
        return dataclasses.replace(self, rows=self.rows[rank::size])

    def batches(self, batch_size: int, *, by_length: bool = False) -> list[dict[str, Tensor]]:
        """``pixel_values`` and ``labels`` of all of them, in their order; they have one length."""
        found = []
        for start in range(0, len(self), batch_size):
            part = self.rows[start : start + batch_size]
            batch = {"pixel_values": torch.stack([pixels for pixels, _ in part])}
            if self.labelled:
                batch["labels"] = torch.tensor(
                    [label for _, label in part], dtype=torch.int64, device="cpu"
                )
            found.append(batch)
        return found


def images_of(
    source: Source,
    processor: Any,
    settings: Any,
    *,
    samples: int | None,
    seed: int,
    labelled: bool = True,
) -> Images:
    """The drawn images of a data set, as the model's processor makes them.

    Columns: ``image`` (``img``), and a class in ``label`` (``labels``, ``fine_label``) by its
    number or name. Where the data set names its classes as config.json does, a number is that of
    the data set's name. ``labelled=False``, for data to keep: classes are neither needed nor read.
    Raises ValueError, naming the row, for another column or class.
    """
    names = _names(source, settings) if labelled else None
    rows: list[Tensor] = []
    waiting: list[Any] = []
    labels: list[int] = []
    for where, row in draw(source, samples, seed):
        image = column_of(where, row, _COLUMNS[0])
        if not hasattr(image, "convert"):
            raise ValueError(f"{where}: the image is a {type(image).__name__}; expected an image")
        waiting.append(image.convert("RGB"))
        labels.append(_class(where, row, names, settings) if labelled else 0)
        if len(waiting) == _AT_ONCE:
            rows += _pixels(processor, waiting)
            waiting = []
    rows += _pixels(processor, waiting)
    if not rows:
        raise ValueError(f"{source.path}: no sample in it")
    return Images(list(zip(rows, labels, strict=True)), labelled)


def _class(where: str, row: dict[str, Any], names: list[str] | None, settings: Any) -> int:
    if row.keys() == {"image"}:  # what is read of files alone
        raise ValueError(
            f"{where}: the image has no class; expected a column {' or '.join(_COLUMNS[1])}, or "
            "files in folders that have the names of the classes, all equally deep"
        )
    label = column_of(where, row, _COLUMNS[1])
    named = names[label] if names and isinstance(label, int) else label
    return class_of(where, named, settings)


def _pixels(processor: Any, images: list[Any]) -> list[Tensor]:
    if not images:
        return []
    return list(processor(images=images, return_tensors="pt")["pixel_values"].float())


def _names(source: Source, settings: Any) -> list[str] | None:
    """The data set's names of its classes, where the model knows all of them."""
    features = getattr(source.rows(), "features", None) or {}
    found = next((features[name] for name in _COLUMNS[1] if name in features), None)
    names: list[str] | None = getattr(found, "names", None)
    return names if names and all(name in settings.label2id for name in names) else None
