"""The samples of a run, whatever batch and process they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from filet.blockwise.batches import Batch
from filet.model.batch import IGNORED
from filet.model.sample import COUNTED, Sample, sample_of

__all__ = ["digest_of", "samples_of"]


def samples_of(batch: Batch) -> list[Sample]:
    """The samples of a batch, in their order. Padding is what its attention_mask leaves out."""
    ids: Tensor = batch.inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED, dtype=torch.int64).flatten()
    labels = labels.index_copy(0, batch.rows, batch.labels.long())
    own = {**batch.inputs, "labels": labels.view_as(ids), COUNTED: batch.mask}
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    return [sample_of(own, mask, index, ids.shape) for index in range(len(ids))]


def digest_of(samples: Iterable[str]) -> str:
    """Of samples, given by their digests, in any order."""
    return hashlib.blake2b("".join(sorted(samples)).encode(), digest_size=16).hexdigest()
