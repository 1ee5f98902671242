"""Samples into token ids, and these into padded batches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from filet.data.samples import Sample
from filet.model.batch import IGNORED

__all__ = ["Encoded", "batches", "encode"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as token ids, to be put into batches of any size; what :func:`encode` returns.

    Attributes:
        rows: of every usable sample, in the order of the samples: token ids and labels.
        pad: the id that padding gets.
    """

    rows: list[tuple[list[int], list[int]]]
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    def digest(self) -> str:
        """Of all token ids and labels, in their order."""
        return hashlib.blake2b(repr(self.rows).encode(), digest_size=16).hexdigest()

    def share(self, rank: int, size: int) -> Encoded:
        """The samples of one process of several: every ``size``-th, the longest first.

        So all have about as many tokens. The first ones have one sample more where the number does
        not come out even; with more processes than samples some have none.
        """
        if size == 1:
            return self
        rows = sorted(self.rows, key=lambda row: -len(row[0]))
        return Encoded(rows[rank::size], self.pad)

    def batches(self, batch_size: int, *, by_length: bool = False) -> list[dict[str, torch.Tensor]]:
        """Padded batches of all the samples.

        Args:
            batch_size: samples in a batch, as ``by_length`` says, at least 1.
            by_length: False keeps the order of the samples, ``batch_size`` of them in every batch
                but the last. True sorts them, the longest first and equal ones in their order, so
                that a batch has hardly any padding; ``batch_size`` then counts samples as long as
                the longest, and shorter ones share their room: no batch holds more tokens, padding
                included, than ``batch_size`` of the longest.

        Returns:
            One dict a batch of ``input_ids``, ``attention_mask`` and ``labels``, each (batch,
            longest) int64 on the CPU. ``labels`` are the input ids (the model shifts them itself),
            -100 on padding and on masked prompts. Padding goes to the right.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not by_length:
            starts = range(0, len(self), batch_size)
            return [_pad(self.rows[start : start + batch_size], self.pad) for start in starts]
        rows = sorted(self.rows, key=lambda row: -len(row[0]))
        room = batch_size * len(rows[0][0]) if rows else 0
        found, start = [], 0
        while start < len(rows):
            stop = start + room // len(rows[start][0])
            found.append(_pad(rows[start:stop], self.pad))
            start = stop
        return found


def encode(
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    max_length: int,
    mask_prompt: bool = False,
) -> Encoded:
    """Tokenise samples for a causal language model.

    Prompt and response are tokenised apart, so that the border between them is exact; a line
    break is put between them unless one of them has white space there. A sample longer than
    ``max_length`` loses its end; where it is complete and there is room, the tokenizer's
    end-of-sequence token is appended. Padding takes the tokenizer's padding token, else its
    end-of-sequence token, else 0: it is masked in every case.

    Args:
        samples: what :func:`read_samples` returns.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a sample, at least 2.
        mask_prompt: give the prompt's tokens no label.

    Raises:
        ValueError: ``max_length`` too small, or no sample with anything to predict. Single samples
            of that kind are dropped with one warning that counts them.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = 0 if eos is None else eos

    rows: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        ids, prompt_length = _tokenise(sample, tokenizer, eos)
        if eos is not None and len(ids) < max_length and ids[-1:] != [eos]:
            ids = [*ids, eos]
        ids = ids[:max_length]
        masked = 0
        if mask_prompt:  # a text alone is a prompt altogether, its end included
            masked = len(ids) if sample.response is None else min(prompt_length, len(ids))
        labels = [IGNORED] * masked + ids[masked:]
        # The model predicts labels[1:] from what stands before them.
        if any(label != IGNORED for label in labels[1:]):
            rows.append((ids, labels))

    dropped = len(samples) - len(rows)
    if dropped:
        why = f"fewer than 2 tokens, or no label left within max_length={max_length}"
        if mask_prompt:
            why += " outside the masked prompt"
        if not rows:
            raise ValueError(f"no usable sample among {len(samples)}: {why}")
        warnings.warn(f"dropped {dropped} of {len(samples)} samples: {why}", stacklevel=2)
    if not rows:
        raise ValueError("no samples")
    return Encoded(rows, pad)


def batches(
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    mask_prompt: bool = False,
    by_length: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Samples into padded batches at once: :func:`encode`, then :meth:`Encoded.batches`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoded = encode(samples, tokenizer, max_length=max_length, mask_prompt=mask_prompt)
    return encoded.batches(batch_size, by_length=by_length)


def _tokenise(sample: Sample, tokenizer: Any, eos: int | None) -> tuple[list[int], int]:
    """(token ids, how many of them are the prompt's)."""
    prompt, response = sample.prompt, sample.response
    if response and prompt and not prompt[-1].isspace() and not response[0].isspace():
        prompt += "\n"
    ids: list[int] = list(tokenizer(prompt, verbose=False)["input_ids"])
    if response is None:
        return ids, len(ids)
    if ids and ids[-1] == eos:  # a tokenizer that closes every text itself
        ids.pop()
    following = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, *following], len(ids)


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for row, (ids, row_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.tensor(row_labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
