"""A sample shown as the model gets it, with the tokens marked that it is to predict."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from filet.model.batch import IGNORED

__all__ = ["MARKS", "shown", "shown_other"]

MARKS = ("[[", "]]")

# Of each stretch of a sample: characters of its beginning and end, where it is longer.
_BEGINNING, _END = 60, 30
_STRETCHES = 6


def shown(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """One line: the sample decoded, what counts between :data:`MARKS`, the middles left out.

    The first token is predicted by nothing, whatever its label is.
    """
    counts = [place > 0 and label != IGNORED for place, label in enumerate(labels)]
    stretches = [
        (marked, [ids[place] for place, _ in group])
        for marked, group in groupby(enumerate(counts), key=lambda pair: pair[1])
    ]
    parts = [_part(tokenizer, part, marked) for marked, part in stretches[:_STRETCHES]]
    return "".join(parts) + (" ..." if len(stretches) > _STRETCHES else "")


def shown_other(tokenizer: Any, ids: Sequence[int], labels: Sequence[Any]) -> str:
    """One line: the sample decoded and, between :data:`MARKS`, its class or what it becomes."""
    alone = len(labels) == 1
    target = f"{MARKS[0]}{labels[0]}{MARKS[1]}" if alone else _part(tokenizer, labels, True)
    return f"{_part(tokenizer, ids, False)} → {target}"


def _part(tokenizer: Any, ids: Sequence[int], marked: bool) -> str:
    text = tokenizer.decode(ids).replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    if len(text) > _BEGINNING + _END + 5:
        text = f"{text[:_BEGINNING]} ... {text[-_END:]}"
    return f"{MARKS[0]}{text}{MARKS[1]}" if marked else text
