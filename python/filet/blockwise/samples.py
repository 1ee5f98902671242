"""The samples of a run, whatever batch and process they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from filet.blockwise.batches import Batch
from filet.model.batch import IGNORED, rows_may_be_samples

__all__ = ["Sample", "digest_of", "samples_of"]

_COUNTED = "tokens that count"


@dataclass(frozen=True)
class Sample:
    """One of a batch: what it is, without its padding, and which tokens of its row are its own."""

    digest: str
    start: int
    tokens: int


def samples_of(batch: Batch) -> list[Sample]:
    """The samples of a batch, in their order. Padding is what its attention_mask leaves out."""
    ids: Tensor = batch.inputs["input_ids"]
    labels = torch.full((ids.numel(),), IGNORED).index_copy(0, batch.rows, batch.labels.long())
    own = {**batch.inputs, "labels": labels.view_as(ids), _COUNTED: batch.mask}
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    return [_sample(own, mask, index) for index in range(len(ids))]


def _sample(own: Mapping[str, object], mask: Tensor, index: int) -> Sample:
    there = mask[index].nonzero().flatten().tolist() or [0, -1]
    start, stop = there[0], there[-1] + 1
    digest = hashlib.blake2b(digest_size=12)
    for key, value in sorted(own.items()):
        if not rows_may_be_samples(key, value, mask.shape):
            pass  # images of any sample: all of them, for each
        elif isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            value = value[index, start:stop]
        elif isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1]:
            value = value[index]
        if key in ("attention_mask", _COUNTED):
            if value is None or (isinstance(value, Tensor) and bool(value.all())):
                continue  # a mask without a hole may be left out
        digest.update(f"{key}:{getattr(value, 'shape', value)}".encode())
        if isinstance(value, Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return Sample(digest.hexdigest(), start, stop - start)


def digest_of(samples: Iterable[str]) -> str:
    """Of samples, given by their digests, in any order."""
    return hashlib.blake2b("".join(sorted(samples)).encode(), digest_size=16).hexdigest()
