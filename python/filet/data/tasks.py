"""Samples of tasks other than causal language models: read, and as token ids with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from filet.data.samples import Fields, Sample, read_samples
from filet.data.sources import Source, draw
from filet.data.tokens import Encoded, Row, Used, beyond, pad_of
from filet.model.batch import IGNORED

__all__ = ["class_of", "column_of", "encoded_for"]

# Columns that are looked for: of a text, of its class; of words, of their classes.
_COLUMNS = {
    "seq-cls": (("text", "sentence"), ("label", "labels")),
    "token-cls": (("tokens", "words"), ("labels", "tags", "ner_tags", "pos_tags")),
}

# Of what a masked language model predicts (BERT): the share, and what stands there instead.
_MASKED, _AS_MASK, _AS_ANY = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class _Labelled:
    """A text with its class, or words with theirs."""

    where: str
    text: Any
    label: Any


def encoded_for(
    task: str,
    source: Source,
    tokenizer: Any,
    settings: Any,
    *,
    fields: Fields,
    samples: int | None,
    seed: int,
    max_length: int,
    labelled: bool = True,
) -> Encoded:
    """The drawn samples of a data set for a task of texts that is not causal.

    - "seq2seq-lm": what is read of pairs for a causal model (:func:`read_samples`); prompt and
      response are two texts, less the white space between them.
    - "masked-lm": the same, pairs as one text. 15% of the tokens that are not special, at least
      one, are predicted: by the mask in 80% of the places, by any token in 10%, by themselves in
      the rest. Drawn by ``seed`` and the sample's place among the drawn ones.
    - "seq-cls": ``text`` or ``sentence``, and ``label`` or ``labels``: a number of a class or its
      name in the model's config.json; a number of any kind where it has one class (a regression).
    - "token-cls": ``tokens`` or ``words``, and a list of as many in ``labels``, ``tags``,
      ``ner_tags`` or ``pos_tags``. A word's first token has its class, the others have none.

    ``labelled=False``, for data to keep: classes are neither needed nor read, and either of the
    last two takes the other's column, so that any text will do.
    Samples longer than ``max_length`` lose their end. Raises ValueError, naming the row, for what
    has not these columns or another label, and where nothing is left.
    """
    cutting = _Cutting(tokenizer, max_length)
    rows: Iterable[Row]  # made one by one: what was cut is asked in between
    if task in _COLUMNS and not labelled:
        chosen: list[Any] = list(draw(source, samples, seed))
        if not chosen:
            raise ValueError(f"{source.path}: no sample in it")
        rows, form = (_unlabelled(where, row, cutting) for where, row in chosen), "none"
    elif task in _COLUMNS:
        chosen = _labelled(source, _COLUMNS[task], fields, samples, seed)
        make = _one_class if task == "seq-cls" else _classes
        rows = (make(each, cutting, settings) for each in chosen)
        form = "one" if task == "seq-cls" else "own"
    else:
        chosen = _texts(read_samples(source, fields=fields, samples=samples, seed=seed), task)
        if task == "seq2seq-lm":
            rows, form = (_pair(each, cutting) for each in chosen), "other"
        else:
            rows = (
                _masked(each, cutting, settings, numpy.random.default_rng((seed, n)))
                for n, each in enumerate(chosen)
            )
            form = "own"
    used = Used()
    for row in rows:
        cut = cutting.since()
        some = row[0] and (form == "none" or any(label != IGNORED for label in row[1]))
        nothing = f"nothing to {'read' if form == 'none' else 'predict'}"
        used.add(row, cut, None if some else beyond(max_length) if cut else nothing)
    return used.encoded(pad_of(tokenizer), form)


def _texts(samples: Sequence[Any], task: str) -> list[Sample]:
    for sample in samples:
        if not isinstance(sample, Sample) or (task == "seq2seq-lm" and not sample.response):
            expected = "a prompt and a response" if task == "seq2seq-lm" else "a text"
            raise ValueError(f"{sample.where} is for another task; expected {expected} of text")
    return list(samples)


class _Cutting:
    """A tokenizer that cuts what is longer than ``max_length``, its special tokens left in."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self._max_length = max_length
        self._cut = False

    def __call__(self, *text: Any, **more: Any) -> Any:
        found = self.tokenizer(*text, verbose=False, **more)
        if len(found["input_ids"]) <= self._max_length:
            return found
        self._cut = True
        return self.tokenizer(*text, truncation=True, max_length=self._max_length, **more)

    def since(self) -> bool:
        """Whether anything was cut since this was last asked."""
        cut, self._cut = self._cut, False
        return cut


def _pair(sample: Sample, cutting: _Cutting) -> Row:
    response = (sample.response or "").lstrip()
    return (
        list(cutting(sample.prompt.rstrip())["input_ids"]),
        list(cutting(text_target=response)["input_ids"]),
    )


def _masked(sample: Sample, cutting: _Cutting, settings: Any, draws: Any) -> Row:
    tokenizer = cutting.tokenizer
    if tokenizer.mask_token_id is None:
        raise ValueError("--model: the tokenizer has no mask token, which --task masked-lm needs")
    text = sample.prompt + (sample.response or "")
    ids = list(cutting(text)["input_ids"])
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    places = [place for place, bit in enumerate(special) if not bit]
    if not places:
        return [], []
    number = max(1, round(_MASKED * len(places)))
    labels: list[Any] = [IGNORED] * len(ids)
    for place in sorted(map(int, draws.choice(places, number, replace=False))):
        labels[place] = ids[place]
        kind = draws.random()
        if kind < _AS_MASK:
            ids[place] = tokenizer.mask_token_id
        elif kind < _AS_MASK + _AS_ANY:
            ids[place] = int(draws.integers(settings.vocab_size))
    return ids, labels


def _labelled(
    source: Source,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    fields: Fields,
    samples: int | None,
    seed: int,
) -> list[_Labelled]:
    of_text = names[0] if fields.text is None else (fields.text,)
    found = [
        _Labelled(where, column_of(where, row, of_text), column_of(where, row, names[1]))
        for where, row in draw(source, samples, seed)
    ]
    if not found:
        raise ValueError(f"{source.path}: no sample in it")
    return found


def column_of(where: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What the first of these columns has; a ValueError where there is none of them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: no column {' or '.join(names)}; found {', '.join(sorted(row))}")


def _unlabelled(where: str, row: Mapping[str, Any], cutting: _Cutting) -> Row:
    """A text, or words, without a class."""
    text = column_of(where, row, [name for names, _ in _COLUMNS.values() for name in names])
    words = isinstance(text, list)
    if not all(isinstance(each, str) for each in (text if words else [text])):
        raise ValueError(f"{where}: expected a text, or a list of words")
    return list(cutting(text, is_split_into_words=words)["input_ids"]), []


def _one_class(sample: _Labelled, cutting: _Cutting, settings: Any) -> Row:
    if not isinstance(sample.text, str):
        kind = type(sample.text).__name__
        raise ValueError(f"{sample.where}: the text is a {kind}; expected a string")
    ids = list(cutting(sample.text)["input_ids"])
    if settings.num_labels == 1:
        if isinstance(sample.label, bool) or not isinstance(sample.label, (int, float)):
            raise ValueError(f"{sample.where}: label {sample.label!r}; expected a number")
        return ids, [float(sample.label)]
    return ids, [class_of(sample.where, sample.label, settings)]


def _classes(sample: _Labelled, cutting: _Cutting, settings: Any) -> Row:
    words, labels = sample.text, sample.label
    if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
        raise ValueError(f"{sample.where}: expected a list of words, and a list of as many labels")
    if not getattr(cutting.tokenizer, "is_fast", False):
        raise ValueError("--model: --task token-cls needs a tokenizer with tokenizer.json")
    found = cutting(words, is_split_into_words=True)
    of_token = found.word_ids()
    counted = [
        IGNORED
        if word is None or (place and of_token[place - 1] == word)
        else class_of(sample.where, labels[word], settings)
        for place, word in enumerate(of_token)
    ]
    return list(found["input_ids"]), counted


def class_of(where: str, label: Any, settings: Any) -> int:
    """The number of a class, given so or by its name."""
    number = settings.label2id.get(label) if isinstance(label, str) else label
    classes = settings.num_labels
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < classes:
        names = ", ".join(map(str, list(settings.label2id)[:5]))
        raise ValueError(
            f"{where}: label {label!r}; expected 0 … {classes - 1}, or a name of config.json "
            f"({names}{', …' if classes > 5 else ''}); of a new head --num-labels says how many"
        )
    return number
