"""Samples into token ids, and these into padded batches."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from filet.data.chat import encode_chat, shared_length
from filet.data.samples import AnySample, Chat, Sample, Tokens
from filet.model.batch import IGNORED

__all__ = [
    "Encoded",
    "Row",
    "Used",
    "batches",
    "beyond",
    "encode",
    "pad_of",
    "row_of",
    "stacked",
    "why_not",
]


Row = tuple[list[int], list[Any]]
"""Token ids and labels of a sample."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as token ids, to be put into batches of any size; what :func:`encode` returns.

    Attributes:
        rows: of every usable sample, in the order of the samples: token ids and labels.
        pad: the id that padding gets.
        form: of the labels. "next": one for each token, predicted by the one before it. "own": one
            for each token, predicted there. "other": a sequence of its own. "one": a single one.
            "none": there are none, and batches have none.
        cut: how many of the samples were longer and lost their end; of all that were drawn, also
            in a share.
    """

    rows: list[Row]
    pad: int
    form: Literal["next", "own", "other", "one", "none"] = "next"
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def terms(self) -> int:
        """Labels that are predicted; of "next" those with a token before them."""
        first = 1 if self.form == "next" else 0
        return sum(label != IGNORED for _, labels in self.rows for label in labels[first:])

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all token ids and labels, in their order."""
        found = hashlib.sha256()
        for ids, labels in self.rows:
            found.update(array("d", [len(ids), *ids, *labels]))
        return found.hexdigest()

    def share(self, rank: int, size: int) -> Encoded:
        """The samples of one process of several: every ``size``-th, the longest first.

        So all have about as many tokens. The first ones have one sample more where the number does
        not come out even; with more processes than samples some have none.
        """
        if size == 1:
            return self
        rows = sorted(self.rows, key=lambda row: -len(row[0]))
        return dataclasses.replace(self, rows=rows[rank::size])

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
            longest) int64 on the CPU. ``labels`` are -100 on padding and where nothing is
            predicted; those of "next" are the input ids (the model shifts them itself), of "one"
            they are (batch,). Padding goes to the right.
        """
        return [self.padded(places) for places in self.places(batch_size, by_length)]

    def places(self, batch_size: int, by_length: bool) -> list[list[int]]:
        """Which rows are in each batch of :meth:`batches`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = list(range(len(self)))
        if not by_length:
            return [order[start : start + batch_size] for start in order[::batch_size]]
        order.sort(key=lambda place: -len(self.rows[place][0]))
        room = batch_size * len(self.rows[order[0]][0]) if order else 0
        found, start = [], 0
        while start < len(order):
            stop = start + room // len(self.rows[order[start]][0])
            found.append(order[start:stop])
            start = stop
        return found

    def padded(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        """The batch of these rows."""
        ids, labels = ([self.rows[place][side] for place in places] for side in (0, 1))
        counted = [[1] * len(row) for row in ids]
        batch = {"input_ids": stacked(ids, self.pad), "attention_mask": stacked(counted, 0)}
        if self.form == "one":
            found = [label for (label,) in labels]
            kind = torch.float32 if isinstance(found[0], float) else torch.int64  # a regression's
            batch["labels"] = torch.tensor(found, dtype=kind, device="cpu")
        elif self.form != "none":
            batch["labels"] = stacked(labels, IGNORED)
        return batch


def encode(
    samples: Sequence[AnySample],
    tokenizer: Any,
    *,
    max_length: int,
    count_prompt: bool = False,
    labelled: bool = True,
) -> Encoded:
    """Tokenise samples for a causal language model, as TRL's SFTTrainer does.

    A prompt and its response are tokenised as one text; the response begins where that departs from
    the prompt alone. The tokenizer's end-of-sequence token is appended to a text that lacks it, and
    to no conversation: its template ends it. A sample longer than ``max_length`` loses its end.
    Padding takes the tokenizer's padding token, else its end-of-sequence token, else 0: it is
    masked in every case.

    Args:
        samples: what :func:`filet.data.samples.read_samples` returns.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a sample, at least 2.
        count_prompt: label the prompts too, and the turns of others than the assistant.
        labelled: False for data to keep, of which nothing is predicted: every token will do.

    Raises:
        ValueError: ``max_length`` too small, no sample with anything to predict, or a conversation
            that :func:`filet.data.chat.encode_chat` refuses. Single samples without anything to
            predict are dropped with one warning that counts them.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    used = Used()
    for sample in samples:
        # Where nothing is predicted it does not matter where a conversation's answers begin.
        ids, labels = row_of(sample, tokenizer, count_prompt=count_prompt or not labelled)
        row = ids[:max_length], labels[:max_length] if labelled else []
        used.add(row, len(ids) > max_length, why_not(labels if labelled else ids, max_length))
    return used.encoded(pad_of(tokenizer), "next" if labelled else "none")


def why_not(labels: Sequence[int], max_length: int) -> str | None:
    """Why a sample of these labels, of the next token, cannot be used; None where it can."""
    # The model predicts labels[1:] from what stands before them.
    first = next((at for at, label in enumerate(labels) if at and label != IGNORED), None)
    if first is None:
        return "fewer than 2 tokens" if len(labels) < 2 else "no answer in it"
    return None if first < max_length else beyond(max_length)


def beyond(max_length: int) -> str:
    """Why a sample cannot be used that could be if it had not been cut."""
    return f"all that is to be predicted lies beyond max_length={max_length}"


def pad_of(tokenizer: Any) -> int:
    """The id that padding gets."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in given if each is not None), 0)


def row_of(sample: AnySample, tokenizer: Any, *, count_prompt: bool) -> Row:
    """Token ids and labels of a sample, of any length; :func:`encode` says how."""
    if isinstance(sample, Tokens):
        return list(sample.ids), list(sample.labels)
    if isinstance(sample, Chat):
        return encode_chat(sample, tokenizer, count_prompt=count_prompt)
    return _encode_text(sample, tokenizer, tokenizer.eos_token_id, count_prompt)


class Used:
    """The samples of which there is something to predict, and why the others are not used.

    Attributes:
        rows: of those that are used.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._cut = 0
        self._dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        """All that were added."""
        return len(self.rows) + self._dropped.total()

    def add(self, row: Row, cut: bool, why: str | None) -> None:
        """A sample's row; ``cut``: it lost its end; ``why`` it cannot be used, None if it can."""
        if why is not None:
            self._dropped[why] += 1
            return
        self.rows.append(row)
        self._cut += cut

    def encoded(self, pad: int, form: Any = "next") -> Encoded:
        """What is used; a warning where some samples are not, a ValueError where none is."""
        reasons = [
            f"{why} ({number})" if len(self._dropped) > 1 else why
            for why, number in self._dropped.items()
        ]
        if not self:
            raise ValueError("no samples")
        if not self.rows:
            raise ValueError(f"no usable sample among {len(self)}: {'; '.join(reasons)}")
        if reasons:
            dropped = f"dropped {self._dropped.total()} of {len(self)} samples"
            warnings.warn(f"{dropped}: {'; '.join(reasons)}", stacklevel=3)
        return Encoded(self.rows, pad, form, self._cut)


def batches(
    samples: Sequence[AnySample],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    count_prompt: bool = False,
    by_length: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Samples into padded batches at once: :func:`encode`, then :meth:`Encoded.batches`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoded = encode(samples, tokenizer, max_length=max_length, count_prompt=count_prompt)
    return encoded.batches(batch_size, by_length=by_length)


def _encode_text(
    sample: Sample, tokenizer: Any, eos: int | None, count_prompt: bool
) -> tuple[list[int], list[int]]:
    text = sample.prompt + (sample.response or "")
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    if sample.response is None or count_prompt:
        return ids, list(ids)
    start = shared_length(tokenizer(sample.prompt, verbose=False)["input_ids"], ids)
    return ids, [IGNORED] * start + ids[start:]


def stacked(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """(rows, longest) int64, filled up to the right."""
    found = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64, device="cpu")
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
    return found
