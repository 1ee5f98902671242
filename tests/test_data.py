"""Reading text files into samples, and samples into batches."""

from __future__ import annotations

import gzip
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from filet.data.samples import Sample, read_samples
from filet.data.tokens import batches, encode

BOS, EOS, PAD = 1, 2, 0


class Letters:
    """A tokenizer: one token a character, a BOS in front."""

    def __init__(
        self, *, pad: int | None = PAD, eos: int | None = EOS, closes: bool = False
    ) -> None:
        self.pad_token_id = pad
        self.eos_token_id = eos
        self.closes = closes

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        if add_special_tokens:
            ids = [BOS, *ids] + ([EOS] if self.closes else [])
        return {"input_ids": ids}


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# -- text ------------------------------------------------------------------------------------------


def test_txt_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n\nfirst line\nsecond  \r\n \t\n\n\n  third é\n\n".encode())
    assert read_samples(path) == [Sample("first line\nsecond"), Sample("  third é")]
    assert read_samples(path, limit=1) == [Sample("first line\nsecond")]


def test_txt_without_blank_lines_is_a_sample_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_text("\none\ntwo\nthree\n\n", encoding="utf-8")
    assert read_samples(path) == [Sample("one"), Sample("two"), Sample("three")]


@pytest.mark.parametrize("content", [b"", b"\n \n\n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: no sample in it"):
        read_samples(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_undecodable_bytes_are_placed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 2: not UTF-8: byte 0xff at byte 11"):
        read_samples(tmp_path / name)


def test_txt_has_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="has no fields"):
        read_samples(tmp_path / "a.txt", text_field="text")


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "sample"),
    [
        ({"prompt": "p", "completion": "c", "text": "t"}, Sample("t")),
        (
            {"question": "q", "answer": "a", "prompt": "p", "completion": "c"},
            Sample("p", "c"),
        ),
        ({"question": "q", "answer": "a", "prompt": "p"}, Sample("q", "a")),
        ({"id": 3, "question": "q", "answer": "a", "instruction": "i"}, Sample("q", "a")),
        ({"instruction": "i", "output": "o"}, Sample("i", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, Sample("i", "o")),
        ({"instruction": "i", "input": "n", "output": "o"}, Sample("i\nn", "o")),
    ],
)
def test_fields_are_found_in_the_documented_order(
    tmp_path: Path, record: dict[str, Any], sample: Sample
) -> None:
    assert read_samples(write_jsonl(tmp_path / "a.jsonl", record)) == [sample]


def test_named_fields_win(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t", "a": "x", "b": "y"})
    assert read_samples(path, text_field="a") == [Sample("x")]
    assert read_samples(path, prompt_field="a") == [Sample("x")]
    assert read_samples(path, prompt_field="a", response_field="b") == [Sample("x", "y")]


def test_unknown_fields_are_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"body": "t", "label": 1, "prompt": "alone"})
    with pytest.raises(ValueError, match=r"line 1: no known fields.*'body', 'label', 'prompt'"):
        read_samples(path)


def test_a_missing_field_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: no field 'text'; found 'txt'"):
        read_samples(path)
    with pytest.raises(ValueError, match=r"line 1: no field 'body'; found 'text'"):
        read_samples(path, text_field="body")
    assert read_samples(path, limit=1) == [Sample("a")]


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (3, "int"), (["a"], "list")])
def test_a_value_that_is_not_a_string(tmp_path: Path, value: Any, kind: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": value})
    with pytest.raises(ValueError, match=rf"line 2: field 'text' must be a string, got {kind}"):
        read_samples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"line 2: not valid JSON: .* at column 13"),
        ('["b"]', r"line 2: expected a JSON object, got list"),
    ],
)
def test_an_unreadable_line_is_placed(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_samples(path)


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(5000)))
    path.write_bytes(whole)
    assert [sample.prompt for sample in read_samples(path)] == [str(n) for n in range(5000)]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: damaged gzip"):
        read_samples(path)
    assert len(read_samples(path, limit=3)) == 3  # nothing past the third line is read
    path.write_bytes(b'{"text": "not compressed"}\n')
    with pytest.raises(ValueError, match="damaged gzip"):
        read_samples(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    questions = [f"q{n}" for n in range(3000)]
    answers: list[str | None] = [f"a{n}" for n in range(3000)]
    answers[2500] = None
    parquet.write_table(pyarrow.table({"question": questions, "answer": answers}), path)
    assert read_samples(path, limit=2) == [Sample("q0", "a0"), Sample("q1", "a1")]
    assert len(read_samples(path, text_field="question")) == 3000
    with pytest.raises(ValueError, match=r"a\.parquet, row 2501: field 'answer' must be a string"):
        read_samples(path)
    with pytest.raises(ValueError, match=r"row 1: no field 'body'; found 'question', 'answer'"):
        read_samples(path, text_field="body")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match="no sample in it"):
        read_samples(path)
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"a\.parquet, after row 0: unreadable parquet"):
        read_samples(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'filet-kernels\[frontend\]'"):
        read_samples(tmp_path / "a.parquet")


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: unknown suffix, expected one of \.txt"):
        read_samples(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"no data file at .*a\.txt"):
        read_samples(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="text_field excludes"):
        read_samples(tmp_path / "a.jsonl", text_field="a", prompt_field="b")
    with pytest.raises(ValueError, match="response_field needs prompt_field"):
        read_samples(tmp_path / "a.jsonl", response_field="b")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_samples(tmp_path / "a.jsonl", limit=0)


# -- batches ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("prompt", "response", "between"),
    [("ab", "cd", "\n"), ("ab ", "cd", ""), ("ab", " cd", ""), ("", "cd", "")],
)
def test_prompt_and_response(prompt: str, response: str, between: str) -> None:
    [batch] = batches(
        [Sample(prompt, response)], Letters(), max_length=16, batch_size=1, mask_prompt=True
    )
    head = [BOS, *codes(prompt + between)]
    tail = [*codes(response), EOS]
    assert batch["input_ids"].tolist() == [head + tail]
    assert batch["labels"].tolist() == [[-100] * len(head) + tail]
    [plain] = batches([Sample(prompt, response)], Letters(), max_length=16, batch_size=1)
    assert plain["input_ids"].tolist() == [head + tail]
    assert plain["labels"].tolist() == [head + tail]


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt() -> None:
    [batch] = batches([Sample("a", "b")], Letters(closes=True), max_length=16, batch_size=1)
    assert batch["input_ids"].tolist() == [[BOS, *codes("a\nb"), EOS]]


def test_unusable_samples_are_dropped_with_one_warning() -> None:
    samples = [Sample("", ""), Sample("abcdefgh", "x"), Sample("a", "b"), Sample("whole")]
    with pytest.warns(UserWarning, match="dropped 2 of 4 samples") as caught:
        [batch] = batches(samples, Letters(), max_length=6, batch_size=8, mask_prompt=True)
    assert len(caught) == 1
    # "" keeps an end-of-sequence token to predict; the long prompt leaves no room for a label, and
    # a text without a response has none.
    assert batch["input_ids"].tolist() == [
        [BOS, EOS, PAD, PAD, PAD],
        [BOS, *codes("a\nb"), EOS],
    ]


def test_one_token_predicts_nothing() -> None:
    tokenizer = Letters(eos=None)
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 samples: fewer than 2 tokens"):
        [batch] = batches([Sample(""), Sample("a")], tokenizer, max_length=8, batch_size=4)
    assert batch["input_ids"].tolist() == [[BOS, *codes("a")]]


def test_nothing_left_is_an_error_and_nothing_dropped_no_warning() -> None:
    with pytest.raises(ValueError, match="no usable sample among 2: "):
        batches([Sample("a"), Sample("b")], Letters(), max_length=8, batch_size=4, mask_prompt=True)
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
    in_order = encoded.batches(2)
    assert sum(batch["input_ids"].numel() for batch in in_order) > sum(map(math.prod, shapes))


def test_by_length_of_one_sample_a_batch() -> None:
    found = batches(
        [Sample("a"), Sample("abc")], Letters(), max_length=5, batch_size=1, by_length=True
    )
    assert [batch["input_ids"].shape[1] for batch in found] == [5, 3]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode([Sample("a")], Letters(), max_length=5).batches(0)
