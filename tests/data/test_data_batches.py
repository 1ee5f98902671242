"""Texts and token ids into padded batches."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from filet.data.samples import Sample, Tokens
from filet.data.tokens import batches, encode
from made_data import BOS, EOS, PAD, Letters


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_batches_pad_to_the_right_and_keep_the_order() -> None:
    samples = [Sample("abc"), Sample("d"), Sample("ef")]
    first, second = batches(samples, Letters(), max_length=16, batch_size=2)
    assert first["input_ids"].tolist() == [
        [BOS, *codes("abc"), EOS],
        [BOS, *codes("d"), EOS, PAD, PAD],
    ]
    assert first["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert first["labels"].tolist() == [
        [BOS, *codes("abc"), EOS],
        [BOS, *codes("d"), EOS, -100, -100],
    ]
    assert second["input_ids"].tolist() == [[BOS, *codes("ef"), EOS]]
    assert all(value.dtype == torch.int64 for batch in (first, second) for value in batch.values())


def test_a_digest_is_of_every_id_and_label() -> None:
    def digest(*rows: Tokens) -> str:
        return encode(rows, Letters(), max_length=9).digest()

    same = [Tokens([1, 2], [1, 2]), Tokens([3, 4], [-100, 4])]
    others = [
        [same[1], same[0]],
        [same[0], Tokens([3, 5], [-100, 4])],
        [same[0], Tokens([3, 4], [3, 4])],
        [same[0]],
    ]
    found = {digest(*rows) for rows in (same, *others)}
    assert len(found) == 5 and digest(*same) in found


def test_eos_only_after_a_whole_sample_with_room() -> None:
    def ids(text: str, **tokenizer: Any) -> list[int]:
        [batch] = batches([Sample(text)], Letters(**tokenizer), max_length=4, batch_size=1)
        return batch["input_ids"][0].tolist()

    assert ids("ab") == [BOS, *codes("ab"), EOS]
    assert ids("abc") == [BOS, *codes("abc")]
    assert ids("abcd") == [BOS, *codes("abc")]
    assert ids("ab", eos=None) == [BOS, *codes("ab")]
    assert ids("a", closes=True) == [BOS, *codes("a"), EOS]  # not a second one


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(9, EOS, 9), (None, EOS, EOS), (None, None, 0)]
)
def test_padding_token(pad: int | None, eos: int | None, expected: int) -> None:
    tokenizer = Letters(pad=pad, eos=eos)
    [batch] = batches([Sample("abcd"), Sample("a")], tokenizer, max_length=9, batch_size=2)
    hidden = batch["attention_mask"] == 0
    assert hidden.sum() == 3
    assert set(batch["input_ids"][hidden].tolist()) == {expected}
    assert set(batch["labels"][hidden].tolist()) == {-100}


@pytest.mark.parametrize(("prompt", "response"), [("ab\n", "cd"), ("ab", " cd"), ("", "cd")])
def test_prompt_and_response(prompt: str, response: str) -> None:
    sample = Sample(prompt, response)
    [batch] = batches([sample], Letters(), max_length=16, batch_size=1)
    head, tail = [BOS, *codes(prompt)], [*codes(response), EOS]
    assert batch["input_ids"].tolist() == [head + tail]
    assert batch["labels"].tolist() == [[-100] * len(head) + tail]
    [plain] = batches([sample], Letters(), max_length=16, batch_size=1, count_prompt=True)
    assert plain["input_ids"].tolist() == [head + tail]
    assert plain["labels"].tolist() == [head + tail]


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt() -> None:
    [batch] = batches([Sample("a", "b")], Letters(closes=True), max_length=16, batch_size=1)
    assert batch["input_ids"].tolist() == [[BOS, *codes("ab"), EOS]]
    assert batch["labels"].tolist() == [[-100, -100, *codes("b"), EOS]]


def test_token_ids_are_taken_as_they_are() -> None:
    samples = [Tokens([5, 6, 7, 8], [-100, 6, 7, 8]), Tokens([9, 9], [9, 9])]
    [batch] = batches(samples, Letters(), max_length=3, batch_size=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, PAD]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [9, 9, -100]]


def test_unusable_samples_are_dropped_with_one_warning() -> None:
    samples = [Sample("", ""), Sample("abcdefgh", "x"), Sample("a", "b"), Tokens([4], [4])]
    with pytest.warns(UserWarning, match="dropped 2 of 4 samples") as caught:
        [batch] = batches(samples, Letters(), max_length=6, batch_size=8)
    assert len(caught) == 1
    # "" keeps an end-of-sequence token to predict; the long prompt leaves no room for a label.
    assert batch["input_ids"].tolist() == [[BOS, EOS, PAD, PAD], [BOS, *codes("ab"), EOS]]


def test_one_token_predicts_nothing() -> None:
    tokenizer = Letters(eos=None)
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 samples: fewer than 2 tokens"):
        [batch] = batches([Sample(""), Sample("a")], tokenizer, max_length=8, batch_size=4)
    assert batch["input_ids"].tolist() == [[BOS, *codes("a")]]


def test_what_was_cut_is_counted() -> None:
    """Of the samples that are used; why others are not is said apart."""
    samples = [Sample("ab"), Sample("abcd"), Sample("abcde", "f"), Sample("", ""), Tokens([1], [1])]
    why = r"all that .* lies beyond max_length=5 \(1\); fewer than 2 tokens \(1\)"
    with pytest.warns(UserWarning, match=rf"dropped 2 of 5 samples: {why}$"):
        encoded = encode(samples, Letters(), max_length=5)
    assert (len(encoded), encoded.cut) == (3, 1)  # "" is BOS and EOS, "abcd" lost its EOS
    assert encoded.share(1, 2).cut == 1
    assert encode(samples[:2], Letters(), max_length=6).cut == 0
    with pytest.raises(ValueError, match=r"no usable sample among 1: all that .* max_length=5$"):
        encode(samples[2:3], Letters(), max_length=5)


def test_nothing_left_is_an_error_and_nothing_dropped_no_warning() -> None:
    with pytest.raises(ValueError, match="no usable sample among 2: "):
        batches(2 * [Sample("abcd", "e")], Letters(), max_length=4, batch_size=4)
    with pytest.raises(ValueError, match="no samples"):
        batches([], Letters(), max_length=8, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches([Sample("a")], Letters(), max_length=8, batch_size=4)


def test_batch_arguments() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        batches([Sample("a")], Letters(), max_length=1, batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches([Sample("a")], Letters(), max_length=8, batch_size=0)


# -- batches by length -----------------------------------------------------------------------------


def test_by_length_fills_the_room_and_pads_little() -> None:
    """The same samples, whatever the batches; the longest first, equal lengths in their order."""
    lengths = [3, 14, 5, 5, 9, 2, 14, 7, 3, 16, 5]
    samples = [Sample(chr(ord("a") + i) * (length - 2)) for i, length in enumerate(lengths)]
    encoded = encode(samples, Letters(), max_length=16)
    found = encoded.batches(2, by_length=True)
    rows = [
        ids[mask != 0].tolist()
        for batch in found
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == sorted((ids for ids, _ in encoded.rows), key=len, reverse=True)
    # Room for 2 × 16 tokens: 2 of 16 and 14, 2 of 14 and 9, 4 of 7 and 5, the rest.
    shapes = [tuple(batch["input_ids"].shape) for batch in found]
    assert shapes == [(2, 16), (2, 14), (4, 7), (3, 3)]
    assert encoded.tokens == sum(lengths) == sum(int(b["attention_mask"].sum()) for b in found)
    assert len(encoded) == len(samples)
    assert encoded.terms == sum(lengths) - len(lengths)
    in_order = encoded.batches(2)
    assert sum(batch["input_ids"].numel() for batch in in_order) > sum(map(math.prod, shapes))


def test_by_length_of_one_sample_a_batch() -> None:
    found = batches(
        [Sample("a"), Sample("abc")], Letters(), max_length=5, batch_size=1, by_length=True
    )
    assert [batch["input_ids"].shape[1] for batch in found] == [5, 3]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode([Sample("a")], Letters(), max_length=5).batches(0)


def test_why_a_sample_is_not_used() -> None:
    for sample, why in (
        (Tokens([1], [1]), "fewer than 2 tokens"),
        (Tokens([1, 2], [1, -100]), "no answer in it"),
    ):
        with pytest.raises(ValueError, match=rf"no usable sample among 1: {why}$"):
            encode([sample], Letters(), max_length=5)
