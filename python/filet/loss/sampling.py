"""Labels drawn from the model's own predictions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drawn"]

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
