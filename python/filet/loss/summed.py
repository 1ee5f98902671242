"""The summed token loss behind a batch, whatever reduction the model used.

FILet's g is the gradient of the loss *summed* over its terms: then the second moments of two
batches add up, and the result does not depend on how the samples were batched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from filet.config import FiletConfig
from filet.loss.sampling import drawn, uniform
from filet.model.batch import IGNORED, NUM_ITEMS, labels_of
from filet.model.inputs import Inputs

__all__ = ["ModelLoss", "SummedLoss"]

# The model's loss and ours are the same cross-entropy of the same logits. They differ by rounding
# alone, 2⁻⁸ where the model sums in bfloat16.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ModelLoss:
    """A loss with its graph, the factor that makes it the summed loss, and the terms of the sum."""

    loss: Tensor
    factor: float
    terms: int

    @property
    def requires_grad(self) -> bool:
        return self.loss.requires_grad

    def backward(self, scale: float, retain_graph: bool = False) -> None:
        """Backward from ``scale`` times the summed loss."""
        loss = self.loss.to(torch.promote_types(self.loss.dtype, torch.float32))
        (loss * (self.factor * scale)).backward(retain_graph=retain_graph)


class SummedLoss:
    """Turns what ``forward_fn`` returned into the summed loss.

    Whether the model reduces to a mean or a sum, and whether its logits predict the next label, is
    found by comparing its loss with both, on the first batch that tells.
    """

    def __init__(self, config: FiletConfig, inputs: Inputs) -> None:
        self.config = config
        self.shift = inputs.shift
        self.ignored = inputs.ignored
        self.reduction = None if config.loss_reduction == "auto" else config.loss_reduction
        self.settled = False

    def __call__(self, result: Any, batch: Any) -> ModelLoss:
        """
        Args:
            result: what ``forward_fn`` returned: an output with ``.loss``, a scalar loss, or
                ``(loss, terms)``.
            batch: the batch; its ``labels`` say which positions count.

        Returns:
            the loss, with gradient.
        """
        loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
        loss = loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        divided = isinstance(batch, Mapping) and NUM_ITEMS in batch
        if loss is not None and divided and self.config.fisher == "empirical":
            raise ValueError(
                f"the batch has {NUM_ITEMS}, by which a model divides the sum of its losses, "
                "not by their number; expected a batch without it, or a forward_fn that returns "
                "(loss, terms) with loss their mean"
            )
        logits, labels = getattr(result, "logits", None), labels_of(batch)
        if loss is not None and not self.settled:
            self._settle(float(loss.detach()), logits, labels)
        if self.config.fisher == "sampled":
            return self._sampled(logits, labels, batch)
        if type(result) is tuple and len(result) == 2 and not _has_rows(result[1]):
            loss, terms = result[0], int(result[1])
            return ModelLoss(loss, float(terms), terms)
        if loss is None:
            expected = (
                "return_dict=True in the batch and the model's config"
                if type(result) is tuple and labels is not None
                else f"labels in the batch, which has {_entries(batch)}"
            )
            raise ValueError(
                f"the model returned a {type(result).__name__} without a scalar loss; expected "
                f"{expected}, or a forward_fn(model, batch) that returns the loss, an output with "
                ".loss, or (loss, terms)"
            )
        if labels is None:
            raise ValueError(
                f"the batch has no 'labels' but {_entries(batch)}, so the number of terms in its "
                "loss is unknown; expected labels, or a forward_fn that returns (loss, terms) with "
                "loss their mean"
            )
        terms = self._terms(labels)
        if terms == 0 and logits is not None:
            return ModelLoss((logits * 0).sum(), 1.0, 0)  # the mean over no term is NaN
        if self.reduction is None and terms > 1:
            return ModelLoss(loss, math.nan, terms)  # NaN or infinity: the hooks say where
        return ModelLoss(loss, float(terms) if self.reduction == "mean" else 1.0, terms)

    def _settle(self, loss: float, logits: Tensor | None, labels: Tensor | None) -> None:
        if logits is None or labels is None or labels.is_floating_point():
            # Nothing to compare with: the library's convention, a mean over the labels.
            self.reduction = self.reduction or "mean"
            self.settled = True
            return
        if not math.isfinite(loss):
            return
        candidates: list[tuple[float, Literal["mean", "sum"], bool, int]] = []
        for shift in (self.shift, not self.shift):
            rows = None if shift and labels.dim() < 2 else _pair(logits, labels, shift)
            if rows is None:
                continue
            total, terms = _cross_entropy_sum(*rows)
            candidates += [
                (total / max(terms, 1), "mean", shift, terms),
                (total, "sum", shift, terms),
            ]
        if candidates and not any(
            terms for _, _, shift, terms in candidates if shift == self.shift
        ):
            return  # no label: the next batch tells
        candidates = [c for c in candidates if self.reduction in (None, c[1])]
        if candidates:
            value, reduction, shift, terms = min(candidates, key=lambda c: abs(c[0] - loss))
            if abs(value - loss) <= _TOLERANCE * max(abs(loss), 1e-6):
                self.shift = shift
                if terms > 1:  # the mean and the sum of a single term are the same
                    self.reduction, self.settled = reduction, True
                return
        self.settled = True
        if self.config.loss_reduction == "auto" and self.config.fisher == "empirical":
            raise ValueError(
                f"the model's loss of a batch, {loss:.6g}, is neither the mean nor the sum of the "
                "cross-entropy over its labels; expected FiletConfig(loss_reduction='mean' or "
                "'sum'), or a forward_fn that returns (loss, terms) with loss their mean"
            )

    def _terms(self, labels: Tensor) -> int:
        if labels.is_floating_point():
            return labels.numel()
        counted = _shifted(labels) if self.shift else labels
        return counted.numel() if self.ignored is None else int(counted.ne(self.ignored).sum())

    def _sampled(self, logits: Tensor | None, labels: Tensor | None, batch: Any) -> ModelLoss:
        """Cross-entropy against labels drawn from the model, at the positions that have one.

        The draw of a sample depends on the seed and on the sample's own input, not on the batch or
        the place it came in.
        """
        if logits is None or labels is None or labels.is_floating_point():
            raise ValueError(
                "fisher='sampled' draws labels from the model; expected outputs with .logits "
                "(return_dict=True), and integer 'labels' in the batch, which has "
                f"{_entries(batch)}, that say which positions count"
            )
        pair = _pair(logits, labels, self.shift and labels.dim() > 1)
        if pair is None:
            raise ValueError(
                f"fisher='sampled': logits {tuple(logits.shape)} do not fit labels "
                f"{tuple(labels.shape)}; expected one row of logits for each label"
            )
        loss = logits.new_zeros((), dtype=torch.float32)
        terms = 0
        for index, (rows, wanted) in enumerate(zip(*pair, strict=True)):
            rows = rows.reshape(-1, rows.shape[-1])[wanted.reshape(-1).ne(IGNORED)].float()
            picked = drawn(rows, uniform(self.config, batch, index, rows.shape[0]).to(rows.device))
            loss = loss + F.cross_entropy(rows, picked, reduction="sum")
            terms += rows.shape[0]
        return ModelLoss(loss, 1.0, terms)


def _has_rows(value: Any) -> bool:
    # Logits of one sample and class, (1, 1), are no number.
    return not isinstance(value, (int, float)) and not (
        isinstance(value, Tensor) and value.numel() == 1 and value.dim() < 2
    )


def _entries(batch: Any) -> str:
    return ", ".join(map(str, batch)) if isinstance(batch, Mapping) else "no names"


def _shifted(labels: Tensor) -> Tensor:
    return labels[..., 1:]


def _pair(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor] | None:
    """Logits (B, …, V) and labels (B, …) aligned row by row, or None where they do not fit."""
    if shift:
        logits, labels = logits[..., :-1, :], _shifted(labels)
    if logits.shape[:-1] != labels.shape:
        return None
    return logits, labels.to(logits.device)


@torch.no_grad()
def _cross_entropy_sum(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Sum and number of the terms, a sample at a time so that no second full copy exists."""
    total, terms = 0.0, 0
    for rows, wanted in zip(logits, labels, strict=True):
        counted = wanted.reshape(-1).ne(IGNORED)
        rows = rows.reshape(-1, rows.shape[-1])[counted].float()
        total += float(F.cross_entropy(rows, wanted.reshape(-1)[counted].long(), reduction="sum"))
        terms += rows.shape[0]
    return total, terms
