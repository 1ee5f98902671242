"""What is learned and what may be forgotten: rows, batches, and a population's losses on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from effect.loss import Losses, token_losses
from filet.data.samples import Sample, read_samples
from filet.data.sources import Source
from filet.data.tokens import encode
from filet.model.batch import IGNORED

__all__ = [
    "CausalTask",
    "Row",
    "Task",
    "causal_task",
    "length_multiple",
    "order",
    "padded",
    "token_mask",
]

Row = tuple[Tensor, Tensor]  # of one sample: what the model gets, and its labels

_WINDOW = 128  # rows among which batches of like lengths are made


class Task(Protocol):
    """One data set: rows to learn from, rows to be tested on, rows that measure what is kept.

    ``keep`` are rows by which a start may choose what to leave alone.
    """

    name: str
    train: list[Row]
    test: list[Row]
    general: list[Row]
    keep: list[Row]

    def batch(self, rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs on the device, and labels on the CPU."""
        ...

    def run(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What the losses are computed from."""
        ...

    def losses(
        self, model: Any, output: Tensor, labels: Tensor, members: int, asked: bool
    ) -> Losses:
        """Of every member; how many are right where ``asked``."""
        ...


def length_multiple(device: torch.device) -> int:
    """Of which the lengths of batches are: few lengths, for each is captured once on a GPU."""
    return 32 if device.type == "cuda" else 1


def padded(sequences: Sequence[Tensor], multiple: int, value: int) -> Tensor:
    """(N, L) with ``value`` on the right, L the least multiple that has room for the longest."""
    whole = pad_sequence(list(sequences), True, value)
    return F.pad(whole, (0, -whole.shape[1] % multiple), value=value)


def token_mask(sequences: Sequence[Tensor], length: int) -> Tensor:
    """(N, length) int64: 1 at the tokens of each sequence, 0 at what :func:`padded` adds."""
    lengths = torch.tensor([len(one) for one in sequences]).unsqueeze(1)
    return (torch.arange(length) < lengths).long()


@dataclass
class CausalTask:
    """Answers to be predicted, whose prompt has no labels; or texts.

    Rows are padded on the right, so a causal model needs no mask: what follows a token is not seen
    by it, and padding has no label. Attention without a mask has the fast kernels.

    Attributes:
        options: token ids by which a multiple choice is told, () for a free answer.
        multiple: lengths of batches are padded to one of it.
    """

    name: str
    train: list[Row]
    test: list[Row]
    general: list[Row] = field(default_factory=list)
    keep: list[Row] = field(default_factory=list)
    options: tuple[int, ...] = ()
    pad: int = 0
    multiple: int = 1

    def batch(self, rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        ids = padded([ids for ids, _ in rows], self.multiple, self.pad)
        labels = padded([labels for _, labels in rows], self.multiple, IGNORED)
        return {"input_ids": ids.to(device, non_blocking=True)}, labels

    def run(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model.get_decoder()(**inputs, use_cache=False)[0]

    def losses(
        self, model: Any, output: Tensor, labels: Tensor, members: int, asked: bool
    ) -> Losses:
        options = (
            torch.tensor(self.options, device=output.device) if asked and self.options else None
        )
        return token_losses(output, labels, model.get_output_embeddings(), members, options)


def order(rows: Sequence[Row], seed: int, batch_size: int, steps: int) -> list[list[Row]]:
    """The batches of a run: shuffled by the seed, as many epochs as it takes.

    Rows are sorted by length within windows of the shuffled order, so that a batch has little
    padding, and the batches of a window are shuffled again.
    """
    generator, rows, batches = random.Random(seed), list(rows), []
    window = max(batch_size, _WINDOW // batch_size * batch_size)
    if len(rows) < batch_size:
        raise ValueError(f"{len(rows)} rows; expected at least a batch, {batch_size}")
    while len(batches) < steps:
        generator.shuffle(rows)
        for start in range(0, len(rows), window):
            part = sorted(rows[start : start + window], key=lambda row: len(row[0]))
            cut = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            cut = [one for one in cut if len(one) == batch_size]
            generator.shuffle(cut)
            batches += cut
    return batches[:steps]


def causal_task(
    name: str,
    train: Path,
    test: Path,
    tokenizer: Any,
    *,
    general: Path | None = None,
    keep: Path | None = None,
    options: Sequence[str] = (),
    max_length: int = 320,
    tests: int = 256,
    generals: int = 128,
) -> CausalTask:
    """A task from files that ``filet`` reads: prompts and answers, or plain text, all labelled.

    Args:
        options: words that a multiple choice ends in, told apart by the last token of each.
        tests, generals: how many rows to test on, from the beginning of the file.
    """

    def rows(path: Path | None, limit: int | None) -> list[Row]:
        if path is None:
            return []
        samples = read_samples(Source(path))[:limit]
        text = all(isinstance(one, Sample) and one.response is None for one in samples)
        length = min(max_length, 256) if text else max_length
        encoded = encode(samples, tokenizer, max_length=length)
        return [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in encoded.rows]

    def last(word: str) -> int:
        return int(tokenizer(f"the correct answer is {word}")["input_ids"][-1])

    return CausalTask(
        name,
        rows(train, None),
        rows(test, tests),
        rows(general, generals),
        rows(keep, None),
        tuple(map(last, options)),
        tokenizer.pad_token_id or 0,
    )
