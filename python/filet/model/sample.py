"""The samples of a batch, each told apart by a hash of what it is, whatever batch it is in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from filet.model.batch import (
    IGNORED,
    NUM_ITEMS,
    ids_shape,
    is_divisible,
    rows_may_be_samples,
    samples_in,
    tensors_in,
)

__all__ = ["COUNTED", "Sample", "hash_of", "sample_of"]

COUNTED = "tokens that count"
"""The name of a mask, of which nothing is said where it has no hole: it may be left out."""


@dataclass(frozen=True)
class Sample:
    """One of a batch: what it is, without its padding, and which tokens of its row are its own."""

    digest: str
    start: int
    tokens: int


def sample_of(
    own: Mapping[str, object], mask: Tensor, index: int, ids: torch.Size | None = None
) -> Sample:
    """A row of a batch. Padding is what ``mask`` (samples, tokens) leaves out on either side.

    Where a text has ``ids``, of that shape, images beside it may be of any sample: of each are all.
    """
    there = mask[index].nonzero().flatten().tolist() or [0, -1]
    start, stop = there[0], there[-1] + 1
    digest = hashlib.blake2b(digest_size=12)
    for key, value in sorted(own.items()):
        if not rows_may_be_samples(key, value, ids):
            pass
        elif isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            value = value[index, start:stop]
        elif isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1]:
            value = value[index]
        if key in ("attention_mask", COUNTED):
            if value is None or (isinstance(value, Tensor) and bool(value.all())):
                continue  # a mask without a hole may be left out
        digest.update(f"{key}:{getattr(value, 'shape', value)}".encode())
        if isinstance(value, Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return Sample(digest.hexdigest(), start, stop - start)


def hash_of(batch: Any, is_encoder_decoder: bool) -> int:
    """The sum of a hash of each sample in a batch; sums of batches do not depend on the batching.

    Of all tensors, without the padding that ``attention_mask`` leaves out; of an encoder-decoder's
    labels, without the ignored ones at their ends. A batch whose rows are not its samples is hashed
    as one.
    """
    entries = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(tensors_in(batch)))
    own: dict[str, Any] = {
        str(key): value.detach().cpu()
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() and key != NUM_ITEMS
    }
    if not is_divisible(batch):
        whole = {str(key): each.detach().cpu()[None] for key, each in enumerate(tensors_in(batch))}
        return int(sample_of(whole, _ones(1, 1), 0).digest, 16)
    size, shape = samples_in(batch), ids_shape(batch)
    mask = own.get("attention_mask")
    if mask is None or mask.shape != shape or mask.dim() != 2:
        mask = _ones(size, 1 if shape is None else shape[-1])
    target: dict[str, Tensor] = {}
    if is_encoder_decoder:
        target = {key: own.pop(key) for key in list(own) if key.startswith(("labels", "decoder"))}
    labels = target.get("labels", torch.zeros(size, 1, dtype=torch.float32, device="cpu"))
    its_mask = target.get("decoder_attention_mask", labels.reshape(size, -1) != IGNORED)
    total = 0
    for index in range(size):
        if target:
            own["target"] = sample_of(target, its_mask, index).digest
        total += int(sample_of(own, mask, index).digest, 16)
    return total


def _ones(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.float32, device="cpu")
