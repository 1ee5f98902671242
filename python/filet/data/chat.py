"""Conversations into token ids by a tokenizer's chat template, and which of them are predicted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filet.data.samples import Chat
from filet.model.batch import IGNORED

__all__ = ["encode_chat", "shared_length", "use_template"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_ADVICE = (
    "expected a template that marks the assistant's turns by {% generation %}, or that writes each "
    "turn whatever comes after it (--chat-template FILE); or the loss on all tokens "
    "(--count-prompt)"
)


def use_template(tokenizer: Any, file: str | os.PathLike[str]) -> None:
    """Give a tokenizer the chat template of a file, Jinja in UTF-8."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no chat template at {path}")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def encode_chat(chat: Chat, tokenizer: Any, *, count_prompt: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation.

    Labels are the ids, -100 where nothing is to be predicted. With ``count_prompt`` all of them
    count. Of a prompt and its completion those count from where they depart from the prompt alone,
    as in TRL. Else those of the assistant's turns: what the template marks by ``{% generation %}``,
    or, in a template without marks, what a turn adds to the turns before it and the opening of an
    answer (``add_generation_prompt``).

    Raises ValueError where there is no template, where it refuses the turns, and where the turns up
    to one are not the beginning of the whole.
    """
    template = _template(chat, tokenizer)
    if count_prompt:
        ids = _ids(chat, tokenizer, chat.messages)
        return ids, list(ids)
    if chat.prompt is not None:
        ids = _ids(chat, tokenizer, chat.messages)
        start = shared_length(_ids(chat, tokenizer, chat.messages[: chat.prompt], opened=True), ids)
        return ids, [IGNORED] * start + ids[start:]
    if _GENERATION.search(template):
        found = _applied(chat, tokenizer, chat.messages, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return ids, [i if bit else IGNORED for i, bit in zip(ids, mask, strict=True)]
    return _by_prefix(chat, tokenizer)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _by_prefix(chat: Chat, tokenizer: Any) -> tuple[list[int], list[int]]:
    whole = _ids(chat, tokenizer, chat.messages)
    labels = [IGNORED] * len(whole)
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _ids(chat, tokenizer, chat.messages[:turn], opened=True) if turn else []
        after = _ids(chat, tokenizer, chat.messages[: turn + 1])
        for name, ids in (("before", before), ("up to", after)):
            shared = shared_length(ids, whole)
            if shared < len(ids):
                raise ValueError(
                    f"{chat.where}: by the chat template, the turns {name} turn {turn + 1} (of "
                    f"{len(chat.messages)}) are not the beginning of the whole: alone they go on "
                    f"with {tokenizer.decode(ids[shared : shared + 8])!r}, in the whole with "
                    f"{tokenizer.decode(whole[shared : shared + 8])!r}; {_ADVICE}"
                )
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return whole, labels


def _template(chat: Chat, tokenizer: Any) -> str:
    """The template, which may be another one for tools."""
    try:
        template: str = tokenizer.get_chat_template(tools=chat.tools)
    except ValueError as error:
        raise ValueError(
            f"{chat.where} is a conversation, and the tokenizer has no chat template; expected one "
            "(--chat-template FILE)"
        ) from error
    return template


def _ids(
    chat: Chat, tokenizer: Any, messages: Sequence[Mapping[str, Any]], opened: bool = False
) -> list[int]:
    if not messages:
        return []
    found = _applied(chat, tokenizer, messages, add_generation_prompt=opened)
    return list(found["input_ids"])


def _applied(chat: Chat, tokenizer: Any, messages: Sequence[Any], **more: Any) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=chat.tools,
            tokenize=True,
            return_dict=True,
            **{**chat.settings, **more},
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"{chat.where}: the chat template refuses the turns ({roles}): "
            f"{type(error).__name__}: {error}"
        ) from error
