"""Brown's genres as instructions of a language model."""

from __future__ import annotations

import gzip
import json

import pytest
from test_minilm import Letters

from effect import brown
from effect.brown import ANSWERS, instructions, sources
from effect.kinds import OPTIONS

FACT, FICTION = ("ca01", "cj01", "cj02"), ("ck01", "cl01", "cr01")


class Spelled(Letters):
    """As of a model of its own: no tokens at the ends."""

    cls_token_id = sep_token_id = None

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def corpus(tmp_path):
    """Documents of two pieces, whose words no other has; of one, its tags and quotation marks."""
    for name in (*FACT, *FICTION):
        word = "".join(chr(ord("a") + int(d)) for d in str(abs(hash_of(name))))
        lines = [" ".join(f"{word}{i}{j}/nn" for j in "abc") + " ''/'' ./." for i in "pqrstu"]
        (tmp_path / name).write_text("\n\n\t" + "\n\n\n\t".join(lines))
    return tmp_path


def hash_of(name):
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 10**8


def text_of(path):
    return path.read_text().replace("/nn", "").replace(" ''/''", '"').replace(" ./.", ".")


def test_where_a_text_is_from(corpus):
    text = " ".join(text_of(corpus / "cj01").split())[10:200]
    assert sources(corpus, [text]) == {"cj01"}
    assert sources(corpus, []) == set()
    with pytest.raises(ValueError, match="in no document"):
        sources(corpus, [text, "words that nobody wrote " * 9])


def test_a_text_asks_for_its_class():
    rows = [([102, 97, 99, 116], 0), ([116, 97, 108, 101], 1)]
    one, two = instructions(rows, Spelled())
    assert "Text: fact\n" in one["instruction"] and one["output"] == "the correct answer is fact"
    assert "Text: tale\n" in two["instruction"] and two["output"].endswith("fiction")
    assert OPTIONS["brown"] == ANSWERS


def test_documents_of_the_general_data_are_left_out(corpus, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    left = ("ca01", "ck01")
    lines = [json.dumps({"text": " ".join(text_of(corpus / name).split())}) for name in left]
    (data / "general.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(brown.AutoTokenizer, "from_pretrained", lambda _: Spelled())
    monkeypatch.setattr(brown, "TEST", 1)
    brown.main(["--model", "x", "--brown", str(corpus), "--data", str(data)])
    said = []
    for part in ("train", "test"):
        with gzip.open(data / f"brown_{part}.jsonl.gz", "rt") as file:
            said += [json.loads(line) for line in file]
    texts = [one["instruction"] for one in said]
    first = {name: text_of(corpus / name).split()[0][:8] for name in (*FACT, *FICTION)}
    used = {name for name, word in first.items() if any(word in text for text in texts)}
    assert used == {*FACT, *FICTION} - set(left)
    assert {one["output"] for one in said} == {f"the correct answer is {a}" for a in ANSWERS}
