"""Real English and technical text for the demo and the small benchmark, from Python itself.

What is learned is the language reference, ``pydoc_data.topics`` (what ``help('with')`` prints);
what may be forgotten, and what is kept, are the docstrings of two halves of the standard library.
Every CPython ships them (PSF licence), so nothing is downloaded and nothing is copied into this
repository. Writes ``python_train.jsonl``, ``python_test.jsonl``, ``general.jsonl`` and
``keep.jsonl``, one sample per line in the field "text":

    python examples/python_docs.py build/demo
    python examples/python_docs.py build/effect --characters 240 --held-out 4  # for a CPU
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_EVERY = 6  # every sixth topic is held out
CHARACTERS = 600  # about 150 tokens
KEPT = 64  # samples


def samples(text: str, seen: set[str], characters: int = CHARACTERS) -> list[str]:
    """Whole paragraphs of ``text`` in runs of at least so many characters, each paragraph once.

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
        if sum(map(len, run)) >= characters:
            found.append("\n\n".join(run))
            run = []
    return found  # a short rest is dropped


def docstrings(module: str) -> str:
    """All docstrings of a module of the standard library, read from its source and not imported."""
    spec = find_spec(module)
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        return ""
    tree = ast.parse(Path(str(spec.origin)).read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(filter(None, found))


def split(characters: int = CHARACTERS) -> dict[str, list[str]]:
    """Samples by name of their file; no document and no paragraph is in two of them."""
    names, modules = sorted(topics), sorted(sys.stdlib_module_names)
    seen: set[str] = set()

    def of(texts: Iterable[str]) -> list[str]:
        return [sample for text in texts for sample in samples(text, seen, characters)]

    return {
        "python_test": of(topics[name] for name in names[::HELD_OUT_EVERY]),
        "python_train": of(topics[name] for k, name in enumerate(names) if k % HELD_OUT_EVERY),
        "general": of(map(docstrings, modules[::2])),
        "keep": of(map(docstrings, modules[1::2])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Python's own documents as JSONL.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of a sample, at least")
    parser.add_argument("--held-out", type=int, help="samples of python_test and of general")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    limits = {"python_test": options.held_out, "general": options.held_out, "keep": KEPT}
    for name, texts in split(options.characters).items():
        random.Random(0).shuffle(texts)  # so that the first few are of many documents
        texts = texts[: limits.get(name)]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (options.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{options.folder / name}.jsonl: {len(texts)} samples")


if __name__ == "__main__":
    main()
