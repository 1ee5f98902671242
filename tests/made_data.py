"""Files of rows, and a tokenizer that anybody can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["BOS", "EOS", "PAD", "Letters", "write_jsonl"]

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


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
