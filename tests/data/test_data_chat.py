"""Conversations by a chat template: which tokens count, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers_made import CHATML, LAST_TURN_DIFFERS, MARKED, WITH_TOOLS, bpe

from filet.data.chat import encode_chat, use_template
from filet.data.samples import Chat
from filet.data.shown import shown
from filet.data.tokens import encode

ASKED = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
WHO = {"role": "user", "content": "Who are you?"}
CAT = {"role": "assistant", "content": "I am a cat."}
SYSTEM = {"role": "system", "content": "hello there"}
FOUR = [ASKED, BLUE, WHO, CAT]


def predicted(tokenizer: Any, chat: Chat, **options: Any) -> tuple[str, list[str]]:
    """The whole text, and each stretch of what counts."""
    ids, labels = encode_chat(chat, tokenizer, count_prompt=False, **options)
    assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = []
    for place, label in enumerate(labels):
        if label != -100 and (place == 0 or labels[place - 1] == -100):
            runs.append([])
        if label != -100:
            runs[-1].append(label)
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


def test_by_prefix() -> None:
    """What a turn adds to the turns before it and the opening, its end included."""
    text, runs = predicted(bpe(CHATML), Chat([SYSTEM, *FOUR]))
    assert text == "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in [SYSTEM, *FOUR]
    )
    assert runs == ["It is blue.<|im_end|>\n", "I am a cat.<|im_end|>\n"]


def test_by_the_templates_marks() -> None:
    """The same text; the mask says what counts, here not the line break."""
    text, runs = predicted(bpe(MARKED), Chat([SYSTEM, *FOUR]))
    assert text == predicted(bpe(CHATML), Chat([SYSTEM, *FOUR]))[0]
    assert runs == ["It is blue.<|im_end|>", "I am a cat.<|im_end|>"]


def test_a_prompt_and_its_completion() -> None:
    """All that follows the prompt counts, whoever says it, marks or not."""
    for template in (CHATML, MARKED):
        _, runs = predicted(bpe(template), Chat(FOUR, prompt=1))
        assert runs == [
            "It is blue.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
            "<|im_start|>assistant\nI am a cat.<|im_end|>\n"
        ]


def test_the_count_of_all() -> None:
    for template in (CHATML, MARKED):
        ids, labels = encode_chat(Chat(FOUR), bpe(template), count_prompt=True)
        assert labels == ids and len(ids) > 20


def test_tools_and_their_calls() -> None:
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Paris"}}}
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "It rains."},
        CAT,
    ]
    text, runs = predicted(bpe(WITH_TOOLS), Chat(turns, tools=[tool]))
    assert text.startswith('<|im_start|>system\n{"type": "function"')
    assert runs == [
        '{"name": "rain", "arguments": {"city": "Paris"}}<|im_end|>\n',
        "I am a cat.<|im_end|>\n",
    ]
    assert "system" not in predicted(bpe(WITH_TOOLS), Chat(turns))[0]


def test_more_arguments_of_the_template() -> None:
    tokenizer = bpe("{{ greeting }} " + CHATML)
    text, _ = predicted(tokenizer, Chat(FOUR, settings={"greeting": "hello"}))
    assert text.startswith("hello <|im_start|>user")


def test_a_conversation_has_no_end_of_text_appended() -> None:
    tokenizer = bpe(CHATML)
    [(ids, _)] = encode([Chat(FOUR)], tokenizer, max_length=99).rows
    assert tokenizer.eos_token_id not in ids


def test_turns_that_are_no_beginning_of_the_whole() -> None:
    tokenizer = bpe(LAST_TURN_DIFFERS)
    _, runs = predicted(tokenizer, Chat(FOUR[:2]))
    assert runs == ["<think></think>It is blue.<|im_end|>\n"]
    with pytest.raises(
        ValueError, match=r"row 3: by the chat template, the turns up to turn 2 \(of 4"
    ):
        predicted(tokenizer, Chat(FOUR, where="a.jsonl, row 3"))
    # Asked for all tokens, or for none to predict, nothing has to be told apart.
    encode_chat(Chat(FOUR), tokenizer, count_prompt=True)
    assert encode([Chat(FOUR)], tokenizer, max_length=99, labelled=False).rows[0][1] == []


def test_what_a_template_refuses() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses .*\(system, .*no sys"):
        predicted(bpe(strict + CHATML), Chat([SYSTEM, *FOUR], where="row 2"))
    with pytest.raises(ValueError, match=r"row 2 is a conversation, and the tokenizer has no chat"):
        predicted(bpe(), Chat(FOUR, where="row 2"))
    without = Chat([ASKED, {"role": "assistant", "content": None}])
    with pytest.raises(
        ValueError, match=r"the chat template refuses the turns \(user, assistant\)"
    ):
        predicted(bpe(CHATML), without)


def test_a_template_of_a_file(tmp_path: Path) -> None:
    tokenizer = bpe()
    (tmp_path / "t.jinja").write_text(MARKED)
    use_template(tokenizer, tmp_path / "t.jinja")
    assert predicted(tokenizer, Chat(FOUR))[1][0] == "It is blue.<|im_end|>"
    with pytest.raises(FileNotFoundError, match=r"no chat template at .*u\.jinja"):
        use_template(tokenizer, tmp_path / "u.jinja")


def test_a_conversation_without_an_answer_is_dropped() -> None:
    with pytest.warns(UserWarning, match="dropped 1 of 2 samples"):
        encoded = encode([Chat([ASKED]), Chat(FOUR)], bpe(CHATML), max_length=99)
    assert len(encoded) == 1


# -- one sample shown ------------------------------------------------------------------------------


def test_what_is_shown_is_what_counts() -> None:
    tokenizer = bpe(CHATML)
    [row] = encode([Chat(FOUR)], tokenizer, max_length=99).rows
    assert shown(tokenizer, *row) == (
        r"<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n"
        r"[[It is blue.<|im_end|>\n]]<|im_start|>user\nWho are you?<|im_end|>\n"
        r"<|im_start|>assistant\n[[I am a cat.<|im_end|>\n]]"
    )
    # The first token is predicted by nothing.
    ids = tokenizer("I am a cat.")["input_ids"]
    assert shown(tokenizer, ids, ids) == "I[[ am a cat.]]"


def test_what_is_shown_is_short() -> None:
    tokenizer = bpe(CHATML)
    long = [{**turn, "content": turn["content"] * 50} for turn in FOUR] * 20
    [row] = encode([Chat(long)], tokenizer, max_length=10**6).rows
    line = shown(tokenizer, *row)
    assert len(line) < 700 and line.endswith(" ...") and "\n" not in line
    assert len(re.findall(r"\[\[It is blue\.It.* \.\.\. .*?\]\]", line)) >= 1
