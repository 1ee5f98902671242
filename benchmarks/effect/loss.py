"""The losses of K members' rows, each member by itself.

A model has run K · b samples, those of member 0 first. Of member k, with C_k labelled positions,
    loss_k = 1/C_k Σ_t (log Σ_v exp z_tv − z_t,label),
and their sum over k is what goes backward: no member's gradient sees another member.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filet.model.batch import IGNORED
from filet_kernels import cross_entropy_

__all__ = ["Losses", "class_losses", "token_losses"]

_ROWS = 4096  # of logits at a time: 400 MB in bfloat16 with 49152 words


class Losses(NamedTuple):
    """Of every member: (K,) float32 sums over its terms, how many those are, how many are right.

    ``right`` counts, where asked for, the terms whose label has the largest logit.
    """

    sums: Tensor
    terms: list[int]
    right: Tensor | None

    @property
    def means(self) -> Tensor:
        return self.sums / torch.tensor(self.terms, device=self.sums.device).clamp_min(1)


class _CrossEntropy(torch.autograd.Function):
    """Losses (T,) of hidden rows through a head; logits exist some rows at a time, once.

    The gradient of the rows is made in the forward, where the logits are.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Any:
        losses, gradient = [], torch.empty_like(rows)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            logits = F.linear(rows[part], weight, bias)
            losses.append(cross_entropy_(logits, labels[part]))
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * g.unsqueeze(1).to(gradient.dtype), None, None, None


def token_losses(
    hidden: Tensor, labels: Tensor, head: nn.Linear, members: int, options: Tensor | None = None
) -> Losses:
    """Of a causal language model.

    Args:
        hidden: (K · b, L, h), what the head gets.
        labels: (K · b, L) on the CPU, IGNORED where there is none; position t predicts label t + 1.
        head: the model's, frozen.
        options: (o,) token ids, on the device: ``right`` counts, of the labels that are one of
            them, those with the largest logit of these. The rest of the vocabulary is not asked.
    """
    predicts = F.pad(labels[:, 1:].ne(IGNORED), (0, 1))
    terms = predicts.view(members, -1).sum(1).tolist()
    index = predicts.flatten().nonzero().squeeze(1).to(hidden.device, non_blocking=True)
    wanted = labels[:, 1:][predicts[:, :-1]].to(hidden.device, non_blocking=True)
    rows = hidden.flatten(0, 1).index_select(0, index)
    losses = _CrossEntropy.apply(rows, head.weight, head.bias, wanted)
    sums = torch.stack([part.sum() for part in losses.split(terms)])
    right = None
    if options is not None:
        asked = torch.isin(wanted, options)
        logits = F.linear(
            rows, head.weight[options], None if head.bias is None else head.bias[options]
        )
        hit = asked & (options[logits.argmax(-1)] == wanted)
        right = torch.stack([part.sum() for part in hit.split(terms)])
    return Losses(sums, terms, right)


def class_losses(
    logits: Tensor, labels: Tensor, members: int, groups: Tensor, asked: bool = False
) -> Losses:
    """Of a classifier of one or several data sets.

    Args:
        logits: (K · b, classes).
        labels: (K · b,) on the CPU, IGNORED where there is none.
        groups: (classes,) a number for every class, on the device: the label is chosen among the
            classes of its own number alone.
    """
    terms = labels.ne(IGNORED).view(members, -1).sum(1).tolist()
    wanted = labels.to(logits.device, non_blocking=True)
    others = groups != groups[wanted.clamp_min(0)].unsqueeze(1)
    logits = logits.float().masked_fill(others, -torch.inf)
    losses = F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)
    right = (logits.argmax(-1) == wanted).view(members, -1).sum(1) if asked else None
    return Losses(losses.view(members, -1).sum(1), terms, right)
