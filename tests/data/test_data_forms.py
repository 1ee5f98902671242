"""Columns into samples: what is found by itself, named, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from filet.data.samples import Chat, Fields, Sample, Tokens, read_samples
from filet.data.sources import Source
from made_data import write_jsonl

USER, CAT, DOG = (
    {"role": role, "content": text}
    for role, text in (("user", "who?"), ("assistant", "cat"), ("assistant", "dog"))
)
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}


def read(tmp_path: Path, *records: Any, **fields: Any) -> list[Any]:
    path = write_jsonl(tmp_path / "a.jsonl", *records)
    return read_samples(Source(path), fields=Fields(**fields))


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"text": "t"}, Sample("t")),
    # Raw, as TRL joins them; also where there is a text beside them.
    ({"prompt": "p", "completion": "c", "text": "t"}, Sample("p", "c")),
    ({"question": "q", "answer": "a", "prompt": "p", "completion": "c"}, Sample("p", "c")),
    ({"question": "q", "answer": "a", "prompt": "p"}, Sample("q\n", "a")),
    ({"id": 3, "question": "q ", "answer": "a", "instruction": "i"}, Sample("q ", "a")),
    ({"question": "q", "answer": " a"}, Sample("q", " a")),
    ({"instruction": "i", "output": "o"}, Sample("i\n", "o")),
    ({"instruction": "i", "input": "", "output": "o"}, Sample("i\n", "o")),
    ({"instruction": "i", "input": "n", "output": "o"}, Sample("i\nn\n", "o")),
    # Conversations.
    ({"messages": [USER, CAT], "text": "t", "prompt": "p"}, Chat([USER, CAT])),
    ({"messages": [USER, CAT], "system": "be brief"}, Chat([SYSTEM, USER, CAT])),
    ({"messages": [SYSTEM, USER, CAT], "system": "else"}, Chat([SYSTEM, USER, CAT])),
    ({"conversations": [USER, CAT]}, Chat([USER, CAT])),
    ({"conversations": [said("human", "who?"), said("gpt", "cat")]}, Chat([USER, CAT])),
    ({"conversations": [said("user", "who?"), said("assistant", "cat")]}, Chat([USER, CAT])),
    (
        {"conversations": [said("system", "be brief"), said("human", "who?"), said("gpt", "cat")]},
        Chat([SYSTEM, USER, CAT]),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "who?"}]}, CAT]},
        Chat([USER, CAT]),
    ),
    ({"messages": [USER, CAT], "tools": [TOOL]}, Chat([USER, CAT], tools=[TOOL])),
    ({"messages": [USER, CAT], "tools": json.dumps([TOOL])}, Chat([USER, CAT], tools=[TOOL])),
    ({"messages": [USER, CAT], "tools": []}, Chat([USER, CAT])),
    (
        {"messages": [USER, CAT], "chat_template_kwargs": {"thinking": False}},
        Chat([USER, CAT], settings={"thinking": False}),
    ),
    ({"prompt": [SYSTEM, USER], "completion": [CAT]}, Chat([SYSTEM, USER, CAT], prompt=2)),
    # Pairs: the chosen side.
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, Sample("p", "c")),
    ({"chosen": "The sky is blue.", "rejected": "The sky is red."}, Sample("The sky is", " blue.")),
    ({"prompt": [USER], "chosen": [CAT], "rejected": [DOG]}, Chat([USER, CAT], prompt=1)),
    ({"chosen": [USER, CAT], "rejected": [USER, DOG]}, Chat([USER, CAT], prompt=1)),
    (
        {"prompt": "who?", "chosen": [USER, CAT], "rejected": [USER, DOG]},
        Chat([USER, CAT], prompt=1),
    ),
    # Token ids.
    ({"input_ids": [3, 4, 5], "text": "t"}, Tokens([3, 4, 5], [3, 4, 5])),
    ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, Tokens([3, 4, 5], [-100, 4, 5])),
    ({"input_ids": [3, 4], "completion_mask": [0, 1]}, Tokens([3, 4], [-100, 4])),
    (
        {"input_ids": [3, 4, 5], "assistant_masks": [1, 0, 1], "completion_mask": [0, 1, 1]},
        Tokens([3, 4, 5], [-100, -100, 5]),
    ),
    ({"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0]}, Tokens([3, 4], [3, 4])),
]


@pytest.mark.parametrize(("record", "sample"), FORMS, ids=range(len(FORMS)))
def test_columns_are_found_in_the_documented_order(
    tmp_path: Path, record: dict[str, Any], sample: Any
) -> None:
    assert read(tmp_path, record) == [sample]


def test_the_other_side(tmp_path: Path) -> None:
    pair = {"chosen": [USER, CAT], "rejected": [USER, DOG]}
    assert read(tmp_path, pair, side="rejected") == [Chat([USER, DOG], prompt=1)]
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert read(tmp_path, texts, side="rejected") == [Sample("p", "r")]
    # One side is the beginning of the other: its last turn is what is left to predict.
    longer = {"chosen": [USER, CAT, USER, DOG], "rejected": [USER, CAT]}
    assert read(tmp_path, longer, side="rejected") == [Chat([USER, CAT], prompt=1)]
    assert read(tmp_path, longer) == [Chat([USER, CAT, USER, DOG], prompt=2)]


def test_turns_have_only_what_is_in_their_row(tmp_path: Path) -> None:
    """Arrow gives every turn the keys of all of them."""
    calls = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    answered = [*calls, {"role": "tool", "name": "rain", "content": "yes"}, CAT]
    found = read(tmp_path, {"messages": [USER, CAT]}, {"messages": answered})
    assert found == [Chat([USER, CAT]), Chat(answered)]


def test_turns_of_arrow_have_the_keys_of_all(tmp_path: Path) -> None:
    """In a parquet file each turn is a struct, with null for what it has not."""
    called = {"role": "assistant", "content": None, "name": "rain"}
    rows = [{"messages": [USER, CAT]}, {"messages": [USER, called, CAT]}]
    turn = pyarrow.struct([(key, pyarrow.string()) for key in ("role", "content", "name")])
    schema = pyarrow.schema([("messages", pyarrow.list_(turn))])
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    assert table.to_pylist()[0]["messages"][0] == {**USER, "name": None}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_samples(Source(tmp_path / "a.parquet"))
    assert found == [Chat([USER, CAT]), Chat([USER, called, CAT])]


def test_columns_that_other_rows_have(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"text": "t"}, {"messages": [USER, CAT]}, {"question": "q", "answer": ""}
    )
    assert found == [Sample("t"), Chat([USER, CAT]), Sample("q", "")]


def test_named_columns_win(tmp_path: Path) -> None:
    row = {"text": "t", "a": "x", "b": "y", "messages": [USER, CAT]}
    assert read(tmp_path, row, text="a") == [Sample("x")]
    assert read(tmp_path, row, prompt="a") == [Sample("x")]
    assert read(tmp_path, row, prompt="a", response="b") == [Sample("x\n", "y")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "t", "label": 1}, r"row 1: no known columns.*found 'body', 'label'; name the"),
        ({"prompt": "alone"}, r"row 1: no known columns"),
        ({"text": 3}, r"row 1: field 'text' must be a string, got int"),
        ({"text": ["a"]}, r"row 1: field 'text' must be a string, got list"),
        ({"question": "q", "answer": 4}, r"row 1: field 'answer' must be a string, got int"),
        ({"prompt": "p", "completion": [CAT]}, r"prompt is a str and its completion a list"),
        ({"prompt": [USER], "completion": []}, r"prompt is a list and its completion a list"),
        ({"messages": []}, r"row 1: no turn in it"),
        ({"messages": "hello"}, r"row 1: expected a list of turns, got str"),
        ({"messages": [{"text": "who?"}]}, r"row 1: a turn is .*; expected 'role' and 'content'"),
        ({"conversations": [said("alien", "hi")]}, r"a turn is from 'alien'; expected one of hum"),
        ({"messages": [USER, CAT], "tools": "{"}, r"'tools' is a text that is no JSON"),
        ({"chosen": "a", "rejected": [CAT]}, r"'chosen' is a str and 'rejected' a list"),
        ({"input_ids": [1, 2], "labels": [1]}, r"'labels' has 1 entries; expected 2"),
        ({"input_ids": [1, 2], "completion_mask": [1]}, r"'completion_mask' has 1 entries"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"a turn has parts that are no text",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, record)


def test_a_missing_column_is_placed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: field 'text' must be .*NoneType"):
        read(tmp_path, {"text": "a"}, {"txt": "b"})
    with pytest.raises(ValueError, match=r"row 1: no field 'body'; found 'text'"):
        read(tmp_path, {"text": "a"}, text="body")
