"""The batches of a blockwise run, read once: inputs, labels and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from filet.collect.batches import PreparedBatches
from filet.collect.keep import Keep, Unlabelled, check_keep, said_of_keep
from filet.collect.run import check_terms
from filet.config import FiletConfig
from filet.distributed.group import Group
from filet.distributed.samples import share
from filet.loss.sampling import uniform
from filet.model.batch import IGNORED, without_token_mask
from filet.model.inputs import Inputs, Prepared

__all__ = ["Batch", "read_batches", "read_keep"]


@dataclass(eq=False)
class Batch:
    inputs: dict[str, Any]  # of the model, on the CPU, without labels
    rows: Tensor  # positions (flattened) that predict a label; none in data to keep
    labels: Tensor  # the labels there
    uniform: Tensor | None  # numbers (T, 1) that draw the labels, where they are drawn
    mask: Tensor | None  # tokens that count, None for all
    samples: int
    tokens: int
    data: int  # the sum of a hash of each sample

    @property
    def positions(self) -> int:
        ids: Tensor = self.inputs["input_ids"]
        return ids.numel()


def _counts_of(batches: Sequence[Batch]) -> dict[str, int]:
    """How many "samples", "tokens" and "loss_terms" they have, and "data", of their hashes."""
    return {
        "samples": sum(batch.samples for batch in batches),
        "tokens": sum(batch.tokens for batch in batches),
        "loss_terms": sum(batch.rows.numel() for batch in batches),
        "data": sum(batch.data for batch in batches),
    }


def read_batches(
    batches: Iterable[Mapping[str, Any]],
    config: FiletConfig,
    model: nn.Module,
    group: Group | None = None,
) -> tuple[list[Batch], dict[str, int]]:
    """The batches up to ``config.samples``, and which positions predict what; and their counts.

    Of several processes each reads its share, which may be nothing, and the counts are of all.
    """
    inputs = Inputs(model)
    if not inputs.shift:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model; the blockwise engine takes "
            "those whose logits predict the next token"
        )
    check = partial(_check_form, ("input_ids", "labels"))
    result, counts = _read_all(batches, config, inputs, check, group)
    if not counts["samples"]:
        raise ValueError("there was no sample; expected at least one")
    check_terms(counts["samples"], counts["loss_terms"])
    return result, counts


def read_keep(
    keep: Keep | None, config: FiletConfig, peft_model: PeftModel, group: Group | None = None
) -> tuple[list[Batch], dict[str, int]]:
    """The batches of data to keep up to ``config.samples``, without labels; none where it is None.

    The model is one that :func:`read_batches` has taken. The rest as there.
    """
    if keep is None:
        return [], _counts_of([])
    check_keep(keep, peft_model)
    if isinstance(keep, str):
        raise ValueError(
            "keep='self' is text drawn token by token through the whole model, which the blockwise "
            "engine never has; expected batches of what is not to be forgotten (drawn from a "
            "smaller model, say), or engine='memory' on a device that holds this one"
        )
    check = partial(_check_form, ("input_ids",))
    inputs = Inputs(peft_model.base_model.model)
    with said_of_keep():
        result, counts = _read_all(Unlabelled(keep), config, inputs, check, group)
    if not counts["samples"]:
        raise ValueError("the data to keep gave no sample; expected at least one")
    if not counts["tokens"]:
        raise ValueError(Unlabelled.NO_TOKEN)
    return result, counts


def _read_all(
    batches: Iterable[Any],
    config: FiletConfig,
    inputs: Inputs,
    check: Callable[[Any, int], None],
    group: Group | None,
) -> tuple[list[Batch], dict[str, int]]:
    if group is not None:
        batches, samples = share(group, batches, config.samples)
        config = replace(config, samples=samples)
    prepared = PreparedBatches(batches, config, inputs, lambda: True, check)
    result = [_read(each, config) for each in prepared]
    counts = _counts_of(result)
    return result, counts if group is None else group.summed(counts)


def _check_form(keys: Sequence[str], batch: Mapping[str, Any], number: int) -> None:
    for key in keys:
        value = batch.get(key)
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise ValueError(
                f"batch {number} has no {key} of shape (samples, tokens); expected a dict with "
                f"{' and '.join(keys)}"
            )


def _read(prepared: Prepared, config: FiletConfig) -> Batch:
    """A batch on the CPU, with the labels that its positions predict, if it has labels."""
    batch = {
        key: value.cpu() if isinstance(value, Tensor) else value
        for key, value in prepared.batch.items()
    }
    given = batch.pop("labels", None)
    if given is None:
        given = torch.full_like(batch["input_ids"], IGNORED)
    labels = F.pad(given[:, 1:], (0, 1), value=IGNORED)
    counted = labels != IGNORED
    numbers = None
    if config.fisher == "sampled" and bool(counted.any()):
        rows = [int(row.sum()) for row in counted]
        numbers = torch.cat([uniform(config, batch, i, count) for i, count in enumerate(rows)])
    return Batch(
        inputs=without_token_mask(batch, config.token_mask),
        rows=counted.flatten().nonzero().squeeze(1),
        labels=labels[counted],
        uniform=numbers,
        mask=prepared.masks["decoder"],
        samples=prepared.samples,
        tokens=prepared.tokens,
        data=prepared.data,
    )
