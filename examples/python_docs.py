"""Real English and technical text for the demo: Python's own language reference.

Every CPython ships it as ``pydoc_data.topics`` (what ``help('with')`` prints; PSF licence), so
nothing is downloaded and nothing is copied into this repository. Writes ``train.jsonl`` and
``heldout.jsonl``, one sample per line in the field "text":

    python examples/python_docs.py build/demo
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_EVERY = 6  # every sixth topic is held out
SAMPLE_CHARACTERS = 600  # about 150 tokens


def samples(text: str, seen: set[str]) -> list[str]:
    """Whole paragraphs of ``text`` in runs of at least SAMPLE_CHARACTERS, each paragraph once.

    The reference repeats itself between topics; ``seen`` carries the paragraphs already used.
    """
    found: list[str] = []
    run: list[str] = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        seen.add(key)
        run.append(paragraph.strip("\n"))
        if sum(map(len, run)) >= SAMPLE_CHARACTERS:
            found.append("\n\n".join(run))
            run = []
    return found  # a short rest is dropped


def split() -> tuple[list[str], list[str]]:
    """Training and held-out samples; no topic and no paragraph is in both."""
    names = sorted(topics)
    seen: set[str] = set()
    held_out = [text for name in names[::HELD_OUT_EVERY] for text in samples(topics[name], seen)]
    rest = [name for index, name in enumerate(names) if index % HELD_OUT_EVERY]
    return [text for name in rest for text in samples(topics[name], seen)], held_out


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Python's language reference as JSONL.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(("train", "heldout"), split(), strict=True):
        random.Random(0).shuffle(texts)  # so that the first few are of many topics
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(texts)} samples of Python's language reference")


if __name__ == "__main__":
    main()
