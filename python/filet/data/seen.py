"""Texts with images through a model's processor, and these into batches."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from filet.data.pictures import Pictures, count_of
from filet.data.samples import AnySample, Chat, Fields, Tokens, sample_of
from filet.data.sources import Source, draw
from filet.data.tokens import Encoded, Row, Used, pad_of, row_of, stacked, why_not
from filet.model.batch import IGNORED

__all__ = ["Seen", "seen_of"]

# Of a model's config: the ids in whose places the images are.
_PLACES = ("image_token_id", "image_token_index", "video_token_id")


@dataclass(frozen=True, eq=False)
class _More:
    """What a processor made of a sample beside its ids.

    Attributes:
        of_tokens: by name, a number for each token (sorts of tokens).
        of_images: by name, what the images of the sample became; images come first, or patches.
    """

    of_tokens: dict[str, list[int]]
    of_images: dict[str, Tensor]

    def fits(self, other: _More) -> bool:
        """Whether the images of two samples can lie in one tensor."""
        both = self.of_images.keys() & other.of_images.keys()
        return all(self.of_images[k].shape[1:] == other.of_images[k].shape[1:] for k in both)


@dataclass(frozen=True, eq=False)
class Seen:
    """Texts with images, to be put into batches of any size; what :func:`seen_of` returns.

    Attributes:
        text: their ids and labels.
        more: of each the rest.
    """

    text: Encoded
    more: list[_More]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def rows(self) -> list[Row]:
        return self.text.rows

    @property
    def form(self) -> str:
        return self.text.form

    @property
    def terms(self) -> int:
        return self.text.terms

    @property
    def tokens(self) -> int:
        return self.text.tokens

    @property
    def cut(self) -> int:
        return self.text.cut

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all ids, labels and images, in their order."""
        found = hashlib.sha256(self.text.digest().encode())
        for more in self.more:
            for key, value in sorted(more.of_images.items()):
                found.update(f"{key} {tuple(value.shape)}".encode())
                found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def share(self, rank: int, size: int) -> Seen:
        """The samples of one process of several: every ``size``-th, the longest first."""
        order = sorted(range(len(self)), key=lambda place: -len(self.rows[place][0]))
        mine = order[rank::size] if size > 1 else range(len(self))
        rows = [self.rows[place] for place in mine]
        text = dataclasses.replace(self.text, rows=rows)
        return Seen(text, [self.more[place] for place in mine])

    def batches(self, batch_size: int, *, by_length: bool = False) -> list[dict[str, Tensor]]:
        """As :meth:`Encoded.batches`, with what the model takes of images.

        These lie one after the other along the first dimension, in the order of the samples.
        Images that became tensors of other shapes do not come into one batch.
        """
        found = []
        for places in self.text.places(batch_size, by_length):
            parts: list[list[int]] = []
            for place in places:
                if parts and all(self.more[place].fits(self.more[each]) for each in parts[-1]):
                    parts[-1].append(place)
                else:
                    parts.append([place])
            found += [self._batch(part) for part in parts]
        return found

    def _batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        batch = self.text.padded(places)
        chosen = [self.more[place] for place in places]
        for key in sorted({key for more in chosen for key in more.of_tokens}):
            lines = [
                more.of_tokens.get(key, [0] * len(self.rows[place][0]))
                for place, more in zip(places, chosen, strict=True)
            ]
            batch[key] = stacked(lines, 0)
        for key in sorted({key for more in chosen for key in more.of_images}):
            batch[key] = torch.cat([m.of_images[key] for m in chosen if key in m.of_images])
        return batch


def seen_of(
    source: Source,
    processor: Any,
    settings: Any,
    *,
    fields: Fields,
    samples: int | None,
    seed: int,
    max_length: int,
    count_prompt: bool = False,
    labelled: bool = True,
) -> Seen:
    """The drawn samples of a data set of texts with images, as the model's processor makes them.

    Columns are those of :func:`read_samples`, but no ids; beside them ``images`` or ``image``, or
    images in the parts of the turns (:class:`Pictures`). What counts is said as of texts
    (:func:`encode_chat`), and a token in whose place an image is never does. A text that is no
    conversation and has images is taken as it is, with the marks of its images and without special
    tokens added, as in TRL.

    A sample longer than ``max_length`` loses its end. Where an image would be cut it is dropped,
    as is one with nothing to predict, but where nothing is (``labelled=False``, data to keep); one
    warning counts them. Raises ValueError, naming the row, for what cannot be read, and where no
    sample is left.
    """
    pictures = Pictures(source)
    places = {getattr(settings, name, None) for name in _PLACES} - {None}
    used, found = Used(), list[_More]()
    counts_all = count_prompt or not labelled
    for where, row in draw(source, samples, seed):
        sample = sample_of(where, row, fields)
        if isinstance(sample, Tokens):
            raise ValueError(f"{where}: 'input_ids' are for --task causal-lm; expected text")
        images = pictures.of_row(where, row)
        if isinstance(sample, Chat):
            sample = pictures.placed(sample, images)
        (ids, labels), more = _encoded(sample, processor, images, places, counts_all)
        why = why_not(labels if labelled else ids, max_length)
        if any(each in places for each in ids[max_length:]):
            why = f"not the whole of an image within max_length={max_length}"
        its = ids[:max_length], labels[:max_length] if labelled else []
        used.add(its, len(ids) > max_length, why)
        if why is None:
            of_tokens = {key: value[:max_length] for key, value in more.of_tokens.items()}
            found.append(dataclasses.replace(more, of_tokens=of_tokens))
    if not used:
        raise ValueError(f"{source.path}: no sample in it")
    text = used.encoded(pad_of(processor.tokenizer), "next" if labelled else "none")
    return Seen(text, found)


def _encoded(
    sample: AnySample,
    processor: Any,
    images: Sequence[Any],
    places: set[Any],
    count_prompt: bool,
) -> tuple[Row, _More]:
    """A sample's row, of any length, and the rest."""
    reader = _Reader(processor, images, sample.where)
    ids, labels = row_of(sample, reader, count_prompt=count_prompt)
    counted = [IGNORED if i in places else label for i, label in zip(ids, labels, strict=True)]
    return (ids, counted), reader.more(ids)


class _Reader:
    """A processor with the images of a sample, asked as a tokenizer is."""

    def __init__(self, processor: Any, images: Sequence[Any], where: str) -> None:
        self._processor = processor
        self._images = list(images)
        self._where = where
        self._made: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
        of_chats = inspect.signature(processor.apply_chat_template).parameters
        self._nested = "processor_kwargs" in of_chats  # since transformers 5.4
        # With images a text is taken as it is.
        self.eos_token_id = None if images else processor.tokenizer.eos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.tokenizer.decode(ids)
        return text

    def get_chat_template(self, tools: Any = None) -> str:
        """The processor's template, else that of its tokenizer; ValueError where there is none."""
        found = self._processor.chat_template
        if isinstance(found, Mapping):
            found = found.get("default")
        template: str = found or self._processor.tokenizer.get_chat_template(tools=tools)
        return template

    def __call__(self, text: str, verbose: bool = False) -> dict[str, list[int]]:
        more: dict[str, Any] = {}
        if self._images:
            more = {"images": [self._images], "add_special_tokens": False}
        return self._kept(self._asked(self._processor, text=[text], return_tensors="pt", **more))

    def apply_chat_template(
        self, messages: Sequence[Any], *, tools: Any = None, **settings: Any
    ) -> dict[str, list[int]]:
        """As of a tokenizer; where an answer's marks are asked for, they are looked at."""
        template = self.get_chat_template(tools)
        asked = {"chat_template": template, "tools": tools, **settings}
        plain = {"add_special_tokens": False}
        how: dict[str, Any] = {"processor_kwargs": plain} if self._nested else plain
        made = self._asked(
            self._processor.apply_chat_template, messages, return_tensors="pt", **asked, **how
        )
        found = self._kept(made)
        if "assistant_masks" in made:
            found["assistant_masks"] = made["assistant_masks"][0].tolist()
            self._check_marks(found, messages, asked)
        return found

    def more(self, ids: Sequence[int]) -> _More:
        """What was made beside these ids, which may have an end of their own behind them."""
        made = self._made.get(tuple(ids)) or self._made[tuple(ids[:-1])]
        length = made["input_ids"].shape[1]
        of_tokens, of_images = {}, {}
        for key, value in made.items():
            if key in ("input_ids", "attention_mask", "assistant_masks"):
                continue
            if not isinstance(value, Tensor):
                continue
            if value.shape == (1, length):
                of_tokens[key] = value[0].tolist() + [0] * (len(ids) - length)
            else:
                of_images[key] = value
        return _More(of_tokens, of_images)

    def _kept(self, made: Mapping[str, Tensor]) -> dict[str, list[int]]:
        ids = made["input_ids"][0].tolist()
        self._made[tuple(ids)] = made
        return {"input_ids": ids}

    def _asked(self, function: Any, *args: Any, **more: Any) -> Mapping[str, Tensor]:
        try:
            made: Mapping[str, Tensor] = function(*args, **more)
        except ValueError as error:
            raise ValueError(f"{self._where}: the model's processor: {error}") from error
        return made

    def _check_marks(
        self, found: Mapping[str, list[int]], messages: Sequence[Any], asked: Mapping[str, Any]
    ) -> None:
        """ValueError where other tokens are marked than in the text without its images.

        An image takes many tokens in the place of one: a processor that forgets it marks others.
        """
        if not count_of(messages):
            return
        plain = self._processor.tokenizer.apply_chat_template(messages, **asked)
        marked, expected = (
            [i for i, bit in zip(each["input_ids"], each["assistant_masks"], strict=True) if bit]
            for each in (found, plain)
        )
        if marked != expected:
            from transformers import __version__

            raise ValueError(
                f"{self._where}: {type(self._processor).__name__} of transformers {__version__} "
                f"marks {self.decode(marked[:8])!r} of the answers behind an image, where the "
                f"template marks {self.decode(expected[:8])!r}; expected transformers 5.18 or "
                "later, or a template without {% generation %} (--chat-template FILE)"
            )
