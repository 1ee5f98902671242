"""How the files of the real texts are made."""

from __future__ import annotations

import pytest

from effect.minilm import body, genre, pieces, sentences, spam, visible


class Letters:
    """A tokenizer of one token a letter, [1 … 2] around them."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, text, truncation=False, max_length=0, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens=False)["input_ids"] for one in text]}
        ids = [ord(letter) for letter in text]
        if not add_special_tokens:
            return {"input_ids": ids}
        return {"input_ids": [1, *(ids[: max_length - 2] if truncation else ids), 2]}


def test_of_a_page_its_text_is_read():
    page = "<html><style>p {}</style><p>one&amp;<b>two</b></p><SCRIPT>x<y</SCRIPT>three<br>four"
    assert visible(page).split() == ["one&", "two", "three", "four"]


HEAD = b"From a@b Mon Jan 1\nSubject: secret\nMIME-Version: 1.0\n"
PARTS = (
    HEAD
    + b"""Content-Type: multipart/alternative; boundary="x"

preamble
--x
Content-Type: text/html

<p>page</p>
--x
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

w6RoIHRleHQ=
--x--
"""
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HEAD + b"\nplain\ntext\n", "plain text"),
        (PARTS, "äh text"),
        (PARTS.replace(b"w6RoIHRleHQ=", b""), "page"),
        (HEAD + b"Content-Type: text/html\n\n<b>bold</b>", "bold"),
        (HEAD + b"\n<HTML><b>bold</b>", "bold"),
        (HEAD + b"\na <b> c", "a <b> c"),
        (HEAD + b"Content-Type: text/plain; charset=nonsense\n\n\xe4h", "äh"),
        (HEAD + b"Content-Type: image/png\n\nxyz", ""),
    ],
)
def test_of_an_e_mail_its_body_is_read(message, expected):
    assert " ".join(body(message).split()) == expected


def test_e_mails_are_balanced_and_none_comes_twice(tmp_path):
    for folder, count in (("easy-ham-1", 9), ("hard-ham-1", 4), ("spam-1", 5), ("spam-2", 5)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            text = f"{folder} {number}".ljust(40, "x") + folder
            (tmp_path / folder / f"{number}.txt").write_text(f"A: b\n\n{text}")
    (tmp_path / "spam-2" / "again.txt").write_text("C: d\n\n" + "spam-1 0".ljust(40, "x") + "other")
    (tmp_path / "spam-2" / "short.txt").write_text("C: d\n\nhi")
    train, test = spam(tmp_path, Letters(), 3)
    assert [sum(label == of for _, label in test) for of in (0, 1)] == [3, 3]
    assert [sum(label == of for _, label in train) for of in (0, 1)] == [7, 7]
    said = ["".join(map(chr, ids[1:-1])) for ids, _ in train + test]
    assert len(set(said)) == 20
    assert all(
        text.startswith("spam") == label
        for text, (_, label) in zip(said, train + test, strict=True)
    )
    assert not any(text.endswith("other") for text in said)
    assert len({label for _, label in train[:7]}) == 2


def test_sentences_lose_their_tags():
    text = "\n\n\tThe/at ``/`` and\\/or/cc Jury/nn-tl ''/'' ./.\n\n\n\tHe/pps 1/2/cd ./.\n"
    assert sentences(text) == ['The " and\\/or Jury " .', "He 1/2 ."]


def test_pieces_are_whole_sentences():
    document = [[1] * 3, [2] * 4, [3] * 4, [4] * 12, [5] * 6, [6] * 4]
    expected = [[1] * 3 + [2] * 4, [3] * 4, [4] * 10, [5] * 6 + [6] * 4]
    assert pieces(document, 10) == expected
    assert pieces([*document, [7] * 5], 10) == expected
    assert pieces([*document, [7] * 6], 10) == [*expected, [7] * 6]
    assert pieces([], 10) == []


def test_prose_to_be_tested_on_is_of_other_documents(tmp_path):
    for name in ("ca01", "cj01", "cj02", "ck01", "cl01", "cr01", "cr02"):
        lines = [f"{name}{i:02}".ljust(80, "x") + "/nn ./." for i in range(5)]
        (tmp_path / name).write_text("\n\n\t" + "\n\n\n\t".join(lines))
    (tmp_path / "cats.txt").write_text("not/a document/x")
    train, test = genre(tmp_path, Letters(), 6)
    documents = []
    for rows, each in ((train, None), (test, 6)):
        said = [("".join(map(chr, ids[1:-1])), label) for ids, label in rows]
        assert all(ids[0] == 1 and ids[-1] == 2 and len(ids) == 84 for ids, _ in rows)
        assert all((text[1] in "klr") == label for text, label in said)
        assert len({text for text, _ in said}) == len(said)
        counts = [sum(label == of for _, label in said) for of in (0, 1)]
        assert counts[0] == counts[1] == (each or 5)
        documents.append({text[:4] for text, _ in said})
    assert not documents[0] & documents[1]
