"""The batches of a blockwise run, read once: inputs, labels and masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filet.collect.run import check_terms
from filet.config import FiletConfig
from filet.loss.summed import SummedLoss
from filet.model.batch import IGNORED, first_samples, samples_in, token_masks, without_token_mask
from filet.model.inputs import Inputs

__all__ = ["Batch", "counts_of", "read_batches"]


@dataclass(eq=False)
class Batch:
    inputs: dict[str, Any]  # of the model, on the CPU, without labels
    rows: Tensor  # positions (flattened) that predict a label
    labels: Tensor  # the labels there
    uniform: Tensor | None  # numbers (T, 1) that draw the labels, where they are drawn
    mask: Tensor | None  # tokens that count, None for all
    samples: int
    tokens: int

    @property
    def positions(self) -> int:
        return self.inputs["input_ids"].numel()


def counts_of(batches: Sequence[Batch]) -> dict[str, int]:
    """How many "samples", "tokens" and "loss_terms" they have."""
    return {
        "samples": sum(batch.samples for batch in batches),
        "tokens": sum(batch.tokens for batch in batches),
        "loss_terms": sum(batch.rows.numel() for batch in batches),
    }


def read_batches(
    batches: Iterable[Mapping[str, Any]], config: FiletConfig, model: nn.Module
) -> list[Batch]:
    """The batches up to ``config.samples``, and which positions predict what."""
    loss = SummedLoss(config, model)
    if not loss.shift:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model; the blockwise engine takes "
            "those whose logits predict the next token"
        )
    inputs = Inputs(model)
    result: list[Batch] = []
    samples = 0
    for number, batch in enumerate(batches):
        batch = inputs.checked(batch, number)
        for key in ("input_ids", "labels"):
            value = batch.get(key)
            if not isinstance(value, Tensor) or value.dim() != 2:
                raise ValueError(
                    f"batch {number} has no {key} of shape (samples, tokens); expected a dict with "
                    "input_ids and labels"
                )
        if config.samples is not None:
            batch = first_samples(batch, config.samples - samples)
        size = samples_in(batch)
        if size == 0:
            continue
        masks, tokens = token_masks(batch, size, False, config.token_mask)
        batch = loss.without_padded_terms(batch, masks["decoder"])
        inputs.check_labels(batch, number, shift=True)
        batch = {
            key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        counted = labels != IGNORED
        uniform = None
        if config.fisher == "sampled":
            drawn = []
            for index, row in enumerate(counted):
                drawn.append(loss.uniform(batch, index, int(row.sum())))
            uniform = torch.cat(drawn)
        result.append(
            Batch(
                inputs=without_token_mask(batch, config.token_mask),
                rows=counted.flatten().nonzero().squeeze(1),
                labels=labels[counted],
                uniform=uniform,
                mask=masks["decoder"],
                samples=size,
                tokens=tokens,
            )
        )
        samples += size
        if config.samples is not None and samples >= config.samples:
            break
    if not result:
        raise ValueError("there was no sample; expected at least one")
    check_terms(samples, sum(batch.rows.numel() for batch in result))
    return result
