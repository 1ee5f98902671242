"""A batch of samples: its size, its parts, its masks and labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "IGNORED",
    "NUM_ITEMS",
    "first_samples",
    "ids_shape",
    "is_divisible",
    "labels_of",
    "mapped",
    "of_text",
    "on_host",
    "rows_may_be_samples",
    "samples_in",
    "tensors_in",
    "to_device",
    "token_masks",
    "without_token_mask",
]

IGNORED = -100

# The key of a batch by which a model of transformers divides the sum of its losses.
NUM_ITEMS = "num_items_in_batch"

# Beginnings of what a batch of texts has of images and sounds: any number of them for a sample.
_OF_IMAGES = ("pixel_", "image_", "video_", "input_features", "audio_")


def ids_shape(batch: Any) -> torch.Size | None:
    """The shape of a batch's ids, (samples, tokens) as a rule; None where it has none."""
    entry = batch if isinstance(batch, Mapping) else {}
    ids, embeds = entry.get("input_ids"), entry.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape
    return embeds.shape[:-1] if isinstance(embeds, Tensor) else None


def rows_may_be_samples(key: str, value: Any, ids: torch.Size | None) -> bool:
    """Whether an entry may have a row for each sample, in a batch with ids of that shape.

    A text has any number of images, and its positions beside them come as (3, samples, tokens).
    """
    if ids is None:
        return True
    if key == "position_ids" and isinstance(value, Tensor):
        return value.shape == ids
    return not key.startswith(_OF_IMAGES)


def of_text(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of the same shape without its images; whatever the ids are, they are words."""
    wanted = ("attention_mask", "position_ids")
    found = {key: value for key, value in batch.items() if key in wanted}
    return {**found, "input_ids": torch.zeros_like(batch["input_ids"])}


def labels_of(batch: Any) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, Tensor) else None


def tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_in(value)


def samples_in(batch: Any) -> int:
    """The first dimension of the ids, or of the first tensor where a batch has none."""
    entry = batch if isinstance(batch, Mapping) else {}
    named = [entry[key] for key in ("input_ids", "inputs_embeds") if key in entry]
    tensors = itertools.chain(tensors_in(named), tensors_in(batch))
    size = next((t.shape[0] for t in tensors if t.dim() > 0), None)
    if size is None:
        raise TypeError(
            f"the dataloader gave a {type(batch).__name__} without a tensor; expected a batch of "
            "tensors whose first dimension counts the samples"
        )
    return size


def is_divisible(batch: Any) -> bool:
    """Whether the rows of a batch's tensors are its samples, all of them, so that it can be cut.

    They are not where images of several samples lie in one tensor (``pixel_values`` of patches,
    with ``image_grid_thw``), or where positions in three dimensions, of height and width too, come
    first (``position_ids`` of 3, samples, tokens): such a batch goes through whole.
    """
    values = [batch] if isinstance(batch, Tensor) else batch
    if isinstance(batch, Mapping):
        ids = ids_shape(batch)
        if ids is not None and not all(rows_may_be_samples(*entry, ids) for entry in batch.items()):
            return False
        values = batch.values()
    full = samples_in(batch)
    return all(
        value.dim() == 0 or value.shape[0] == full
        if isinstance(value, Tensor)
        else not isinstance(value, (Mapping, list, tuple))
        for value in values
    )


def mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [mapped(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return function(batch)


def first_samples(batch: Any, size: int) -> Any:
    """At most the first ``size`` samples of a batch; all of one that cannot be divided."""
    if size >= samples_in(batch) or not is_divisible(batch):
        return batch
    return mapped(batch, lambda v: v[:size] if isinstance(v, Tensor) and v.dim() > 0 else v)


def to_device(batch: Any, device: torch.device) -> Any:
    return mapped(batch, lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v)


def token_masks(
    batch: Any, size: int, is_encoder_decoder: bool, token_mask: str | None
) -> tuple[dict[str, Tensor | None], int]:
    """Masks (B, T) of the tokens that count, by side, and how many tokens the batch has.

    ``token_mask`` is the entry of the batch that has them, see :class:`filet.FiletConfig`.
    """
    entry = batch if isinstance(batch, Mapping) else {}
    attention = None if token_mask is None else _mask(entry, token_mask)
    if attention is not None:
        tokens = int(attention.sum())
    else:
        shape = ids_shape(entry)
        tokens = size if shape is None else shape.numel()
    if not is_encoder_decoder:
        sides = {"decoder": attention}
    else:
        decoder = None if token_mask is None else _mask(entry, "decoder_attention_mask")
        labels = entry.get("labels")
        if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
            # The padding comes after the last label; what has none before that is a prompt.
            decoder = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        elif decoder is None and "decoder_input_ids" not in entry:
            decoder = attention  # a classifier, whose decoder takes the encoder's input
        sides = {"encoder": attention, "decoder": decoder}
    # A mask without a hole is dropped: the unweighted product is the cheaper one. Of several
    # choices a sample (B, C, T), models make as many samples.
    holed = {
        k: m.flatten(0, -2) if m is not None and not bool(m.all()) else None
        for k, m in sides.items()
    }
    return holed, tokens


def without_token_mask(batch: Any, token_mask: str | None) -> Any:
    """What the model gets of a batch: it does not know a mask of another name than its own."""
    if token_mask in ("attention_mask", None):
        return batch
    return {key: value for key, value in batch.items() if key != token_mask}


def _mask(entry: Mapping[str, Any], key: str) -> Tensor | None:
    """Which tokens a mask of the batch counts; an error where it does not tell."""
    mask = entry.get(key)
    if mask is None:
        if key in ("attention_mask", "decoder_attention_mask"):
            return None
        raise ValueError(
            f"token_mask={key!r} is not in the batch, which has {', '.join(map(str, entry))}; "
            "expected the name of a mask (samples, tokens)"
        )
    ids = ids_shape(entry)
    additive = isinstance(mask, Tensor) and mask.is_floating_point() and bool((mask < 0).any())
    if not isinstance(mask, Tensor) or additive or (mask.dim() != 2 and mask.shape != ids):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{key} is {'additive, ' if additive else ''}{what}, from which padding cannot be "
            "told; expected 1 for the tokens that count and 0 for padding, (samples, tokens), or "
            "FiletConfig(token_mask=...), the name of such a mask in the batch or None if all count"
        )
    return mask != 0


def on_host(batch: Any) -> Any:
    # A copy also of what is there already: a dataloader may fill the same tensors again.
    return mapped(batch, lambda v: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v)
