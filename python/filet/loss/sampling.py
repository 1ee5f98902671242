"""Labels drawn from the model's own predictions.

The draw of a sample depends on the seed and on the sample's own input, not on the batch or the
place it came in.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from filet.config import FiletConfig
from filet.model.batch import ids_shape, rows_may_be_samples

__all__ = ["drawn", "uniform"]

# Probabilities in float64 that exist at a time while labels are drawn.
_DRAWN = 2**24


@torch.no_grad()
def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels (T,) drawn from softmax(logits) by ``uniform`` (T, 1), some rows at a time."""
    step = max(1, _DRAWN // logits.shape[-1])
    picked = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
    for rows, share in zip(logits.split(step), uniform.split(step), strict=True):
        cumulative = rows.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        picked.append(torch.searchsorted(cumulative, share * total, right=True).squeeze(1))
    return torch.cat(picked).clamp_max_(logits.shape[-1] - 1)


def uniform(config: FiletConfig, batch: Any, index: int, rows: int) -> Tensor:
    """Numbers in [0, 1) by which a sample's labels are drawn, (rows, 1) float64 on the CPU."""
    generator = torch.Generator().manual_seed(_sample_seed(config, batch, index))
    return torch.rand(rows, 1, generator=generator, dtype=torch.float64, device="cpu")


def _sample_seed(config: FiletConfig, batch: Any, index: int) -> int:
    """From what is the sample's own, whatever batch it is in."""
    digest = hashlib.blake2b(str(config.seed).encode(), digest_size=8)
    name = config.token_mask
    mask = None if name is None else batch.get(name)
    ids = ids_shape(batch)
    own = batch["labels"].shape[:1] if ids is None else ids
    for key in sorted(batch):
        value = batch[key]
        # Masks, labels and what the decoder takes carry the batch's padding.
        if key in ("attention_mask", "labels", name) or key.startswith("decoder_"):
            continue
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape[0] == 1:  # of all samples
            value = value.expand(own[0], *value.shape[1:])
        if value.shape[: len(own)] != own or not rows_may_be_samples(key, value, ids):
            continue
        row = value[index]
        if isinstance(mask, Tensor) and value.shape[: mask.dim()] == mask.shape:
            row = row[mask[index] != 0]
        row = row.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        digest.update(key.encode() + row.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1
