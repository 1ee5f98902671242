"""Rows into samples: which columns a row has, and what of it is to be predicted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from filet.data.sources import Source, draw
from filet.model.batch import IGNORED

__all__ = [
    "FIELD_PAIRS",
    "AnySample",
    "Chat",
    "Fields",
    "Sample",
    "Tokens",
    "read_samples",
    "sample_of",
]

FIELD_PAIRS = (("question", "answer"), ("instruction", "output"))
"""Fields looked for beside those that TRL knows. A line break is put between the two."""

_MASKS = ("completion_mask", "assistant_masks")

# ShareGPT's names for who speaks; of LLaMA-Factory those of tools.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Sample:
    """One training text: a prompt and what follows it at once, or a text alone.

    Attributes:
        prompt: the prompt, or the whole text where ``response`` is None.
        response: the part that follows the prompt, or None.
        where: the row, for messages.
    """

    prompt: str
    response: str | None = None
    where: str = field(default="a sample", compare=False)


@dataclass(frozen=True)
class Chat:
    """A conversation, for the tokenizer's chat template.

    Attributes:
        messages: the turns, dicts with ``role`` and ``content`` or ``tool_calls``; content is a
            text, or the parts of one that has others than text (:mod:`filet.data.seen`).
        prompt: how many of them are a prompt, what follows being the completion; None: the
            assistant's turns are to be predicted, wherever they are.
        tools: descriptions of the tools that the template tells of, None for none.
        settings: more arguments of the template.
        where: the row, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: int | None = None
    tools: Sequence[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="a sample", compare=False)


@dataclass(frozen=True)
class Tokens:
    """Token ids with their labels, -100 where none counts."""

    ids: Sequence[int]
    labels: Sequence[int]
    where: str = field(default="a sample", compare=False)


AnySample = Sample | Chat | Tokens


@dataclass(frozen=True)
class Fields:
    """Which columns are read, where they are not found by their names; and of pairs, which side.

    Attributes:
        text: column of a whole text; excludes the two below.
        prompt: column of the prompt.
        response: column of what follows it; needs ``prompt``.
        side: of ``chosen`` and ``rejected``.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    side: Literal["chosen", "rejected"] = "chosen"

    def __post_init__(self) -> None:
        if self.text is not None and (self.prompt is not None or self.response is not None):
            raise ValueError("text excludes prompt and response")
        if self.response is not None and self.prompt is None:
            raise ValueError("response needs prompt")


def read_samples(
    source: Source, *, fields: Fields | None = None, samples: int | None = None, seed: int = 0
) -> list[AnySample]:
    """Samples of a data set, ``samples`` of them drawn by :func:`filet.data.sources.draw`.

    Columns: those named, else the first of these that a row has:

    - ``input_ids``, with ``labels``, ``completion_mask`` or ``assistant_masks`` or without;
    - ``messages``, or ``conversations`` with ``from`` and ``value``; beside them ``tools`` and
      ``system``;
    - ``chosen`` and ``rejected``, with ``prompt`` or with the prompt in both;
    - ``prompt`` and ``completion``, both text or both turns;
    - ``text``;
    - ``question`` and ``answer``; ``instruction`` and ``output``, with ``input`` appended to the
      instruction on a new line where it is there and not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no row, an unreadable file, a missing column, a value of another type; the
            message names the file, the row and the column.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    chosen = fields or Fields()
    found = [sample_of(where, row, chosen) for where, row in draw(source, samples, seed)]
    if not found:
        raise ValueError(f"{source.path}: no sample in it")
    for sample in found:
        turns = sample.messages if isinstance(sample, Chat) else ()
        if any(isinstance(turn.get("content"), list) for turn in turns):
            raise ValueError(
                f"{sample.where}: a turn has parts that are no text; expected text alone (images "
                "are for --task vlm)"
            )
    return found


def sample_of(where: str, row: Mapping[str, Any], fields: Fields) -> AnySample:
    """What a row has, as :func:`read_samples` says; turns with images too, as they are."""
    if fields.text is not None:
        return Sample(_string(where, row, fields.text), where=where)
    if fields.prompt is not None:
        return _pair(where, row, fields.prompt, fields.response)
    # A column of another row may be there as well, and empty.
    has = {name for name, value in row.items() if value is not None}
    if "input_ids" in has:
        return _tokens(where, row)
    if has & {"messages", "conversations"}:
        return _chat(where, row, "messages" if "messages" in has else "conversations")
    if {"chosen", "rejected"} <= has:
        return _side(where, row, fields.side)
    for there in (has, row.keys()):  # what is there and empty is said to be so
        if {"prompt", "completion"} <= there:
            return _completed(where, row, row["prompt"], row["completion"])
        if "text" in there:
            return Sample(_string(where, row, "text"), where=where)
        for prompt, response in FIELD_PAIRS:
            if {prompt, response} <= there:
                return _pair(where, row, prompt, response)
    raise ValueError(
        f"{where}: no known columns: looked for 'text', 'messages', 'conversations', 'prompt' + "
        "'completion', 'question' + 'answer', 'instruction' + 'output', 'chosen' + 'rejected', "
        f"'input_ids'; found {_names(row)}; name the column of the text (--text-field), or those "
        "of the prompt and the response (--prompt-field, --response-field)"
    )


def _pair(where: str, row: Mapping[str, Any], prompt: str, response: str | None) -> Sample:
    """A prompt and what follows on a new line, unless one of them has white space there."""
    first = _string(where, row, prompt)
    if (prompt, response) == FIELD_PAIRS[1] and row.get("input"):
        first += "\n" + _string(where, row, "input")
    second = None if response is None else _string(where, row, response)
    if first and second and not first[-1].isspace() and not second[0].isspace():
        first += "\n"
    return Sample(first, second, where)


def _completed(where: str, row: Mapping[str, Any], prompt: Any, completion: Any) -> AnySample:
    """A prompt and its completion as they are, both text or both turns."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Sample(prompt, completion, where)
    kinds = [type(side).__name__ for side in (prompt, completion)]
    if kinds != ["list", "list"] or not completion:
        raise ValueError(
            f"{where}: the prompt is a {kinds[0]} and its completion a {kinds[1]}; expected two "
            "texts, or two lists of turns"
        )
    turns = _turns(where, prompt)
    return _conversation(where, row, [*turns, *_turns(where, completion)], len(turns))


def _side(where: str, row: Mapping[str, Any], side: str) -> AnySample:
    """A side of a pair, with its prompt: the column, else the beginning that both sides have."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    mine = row[side]
    if prompt is not None and isinstance(prompt, str) == isinstance(mine, str):
        return _completed(where, row, prompt, mine)
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise ValueError(
            f"{where}: 'chosen' is a {type(chosen).__name__} and 'rejected' a "
            f"{type(rejected).__name__}; expected two texts, or two lists of turns"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(mine) or (isinstance(chosen, str) and shared and chosen[shared - 1] == " "):
        shared -= 1  # as TRL does: a space belongs to what follows; something is left to predict
    return _completed(where, row, mine[:shared], mine[shared:])


def _chat(where: str, row: Mapping[str, Any], column: str) -> Chat:
    turns = _turns(where, row[column])
    system = row.get("system")
    if isinstance(system, str) and system and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(where, row, turns, None)


def _conversation(
    where: str, row: Mapping[str, Any], turns: list[dict[str, Any]], prompt: int | None
) -> Chat:
    if not turns:
        raise ValueError(f"{where}: no turn in it; expected a list of turns, role and content each")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: 'tools' is a text that is no JSON: {error}") from error
    settings = _without_none(row.get("chat_template_kwargs") or {})
    return Chat(turns, prompt, _without_none(tools) or None, settings, where)


def _turns(where: str, turns: Any) -> list[dict[str, Any]]:
    """Turns as templates take them: ``role`` and ``content``, and nothing that is not there."""
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"{where}: expected a list of turns, got {type(turns).__name__}")
    return [_turn(where, turn) for turn in turns]


def _turn(where: str, turn: Any) -> dict[str, Any]:
    keys = turn.keys() if isinstance(turn, Mapping) else set()
    if {"from", "value"} <= keys and turn["from"] is not None:
        role = _ROLES.get(turn["from"])
        if role is None:
            raise ValueError(
                f"{where}: a turn is from {turn['from']!r}; expected one of {', '.join(_ROLES)}"
            )
        return {"role": role, "content": turn["value"]}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise ValueError(
            f"{where}: a turn is {str(turn)[:80]!r}; expected 'role' and 'content' (or 'from' and "
            "'value')"
        )
    content = turn.get("content")
    if isinstance(content, (list, tuple)):
        if any(not isinstance(part, Mapping) or "type" not in part for part in content):
            raise ValueError(f"{where}: a turn has parts without a type; expected text, say")
        alone = all(part["type"] == "text" for part in content)
        content = "".join(part["text"] for part in content) if alone else _without_none(content)
    # Arrow gives every turn the keys of all of them; templates ask which ones are there.
    rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return {"role": turn["role"], "content": content, **_without_none(rest)}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _tokens(where: str, row: Mapping[str, Any]) -> Tokens:
    """Ids and labels as they are, without what the attention mask leaves out."""
    ids = list(row["input_ids"])
    labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
    given = row.get("labels") is not None
    masks = {} if given else {name: row[name] for name in _MASKS if row.get(name) is not None}
    attention = row.get("attention_mask") or [1] * len(ids)
    for name, values in {"labels": labels, "attention_mask": attention, **masks}.items():
        if len(values) != len(ids):
            raise ValueError(f"{where}: {name!r} has {len(values)} entries; expected {len(ids)}")
    for mask in masks.values():
        labels = [label if bit else IGNORED for label, bit in zip(labels, mask, strict=True)]
    kept = [place for place, bit in enumerate(attention) if bit]
    return Tokens([ids[place] for place in kept], [labels[place] for place in kept], where)


def _string(where: str, row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; found {_names(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} must be a string, got {type(value).__name__}")
    return value


def _names(names: Any) -> str:
    return ", ".join(f"{name!r}" for name in sorted(names)) or "none"
