"""Files, folders and names into rows, and which rows are drawn."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from datasets import Dataset, DatasetDict

from filet.data import sources
from filet.data.samples import Fields, Sample, read_samples
from filet.data.sources import Source, draw
from made_data import write_jsonl

ROWS = [{"text": f"text {n}", "number": n} for n in range(50)]
SIXTEEN = [{"text": str(n)} for n in range(16)]
# Without the time in its header: parameters are parts of a test's name, and processes that collect
# in different seconds have to find the same tests.
CUT_GZIP = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40]


def write(path: Path) -> Path:
    """ROWS, as the name of the path says."""
    data = Dataset.from_list(ROWS)
    if path.name == "saved":
        data.save_to_disk(str(path))
    elif path.name == "splits":
        DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(str(path))
    elif path.name == "shards":
        path.mkdir()
        for number in range(2):
            data.shard(2, number, contiguous=True).to_parquet(path / f"{number}.parquet")
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(write(path.with_suffix("")).read_bytes()))
    elif path.name.endswith(".jsonl"):
        write_jsonl(path, *ROWS)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif path.name.endswith(".csv"):
        data.to_csv(path)
    elif path.name.endswith(".parquet"):
        data.to_parquet(path)
    else:
        path.write_text("\n".join(row["text"] for row in ROWS))
    return path


NAMES = ["a.jsonl", "a.JSONL", "a.json", "a.csv", "a.parquet", "a.txt", "saved", "splits", "shards"]
NAMES += ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz"]


@pytest.mark.parametrize("streaming", [False, True, None])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_file_gives_its_rows(
    name: str, streaming: bool | None, tmp_path: Path
) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    source = Source(path, streaming=streaming)
    expected = [Sample(row["text"]) for row in ROWS]
    assert read_samples(source) == expected
    # Numbers of the seed decide, whatever the form and however it is read.
    numbers = numpy.random.default_rng(3).random(50)
    drawn = sorted(numpy.argsort(numbers)[:7])
    found = read_samples(source, samples=7, seed=3)
    assert found == [expected[n] for n in drawn]
    assert [one.where for one in found] == [f"{path}, row {n + 1}" for n in drawn]
    assert read_samples(source, samples=99) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_is_drawn_as_often(streaming: bool, tmp_path: Path) -> None:
    source = Source(write_jsonl(tmp_path / "a.jsonl", *SIXTEEN), streaming=streaming)
    counts: Counter[str] = Counter()
    for seed in range(200):
        rows = [row["text"] for _, row in draw(source, 4, seed)]
        assert len(set(rows)) == 4
        counts.update(rows)
    # Binomial, 200 × 1/4: mean 50, deviation 6.1.
    assert len(counts) == 16 and all(25 < count < 75 for count in counts.values())


def test_files_larger_than_free_memory_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *SIXTEEN)
    assert isinstance(Source(path).rows(), Dataset)
    monkeypatch.setattr(sources, "available_on_host", lambda: path.stat().st_size - 1)
    assert not isinstance(Source(path).rows(), Dataset)
    assert isinstance(Source(path, streaming=False).rows(), Dataset)


def test_cells_of_a_csv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n007,NA\n"a, b",1.10\n')
    assert read_samples(Source(path)) == [Sample("007\n", "NA"), Sample("a, b\n", "1.10")]


def test_txt_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n\nfirst line\nsecond  \r\n \t\n\n\n  third é\n\n".encode())
    assert read_samples(Source(path)) == [Sample("first line\nsecond"), Sample("  third é")]


def test_txt_without_blank_lines_is_a_sample_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_text("\none\ntwo\nthree\n\n", encoding="utf-8")
    assert read_samples(Source(path)) == [Sample("one"), Sample("two"), Sample("three")]


def test_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "splits")
    assert read_samples(Source(path, split="test")) == [Sample("text 0")]
    with pytest.raises(ValueError, match=r"splits: no split 'dev'; found test, train"):
        read_samples(Source(path, split="dev"))


@pytest.mark.parametrize("content", [b"", b"\n \n\n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: no sample in it"):
        read_samples(Source(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"line 2: not valid JSON: .* at column 13"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"line 2: not UTF-8: .* at byte 11"),
        ("a.jsonl.gz", CUT_GZIP, r"line \d+: damaged"),
        ("a.txt", b"ok\n\xff\n", "a.txt: unreadable: UnicodeDecodeError"),
        ("a.parquet", b"PAR1 or not", "a.parquet: unreadable: Arrow"),
        ("a.json", b"[1, 2", "a.json: unreadable: "),
    ],
)
def test_what_cannot_be_read(
    streaming: bool, name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_samples(Source(tmp_path / name, streaming=streaming))


def test_what_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"a\.pdf: unknown suffix, expected one of \.txt"):
        read_samples(Source(tmp_path / "a.pdf"))
    with pytest.raises(FileNotFoundError, match=r"no data file at .*a\.txt"):
        read_samples(Source(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError, match=r"no data file at data/a\.jsonl"):
        read_samples(Source("data/a.jsonl"))
    with pytest.raises(ValueError, match="no data in it; expected what save_to_disk writes"):
        read_samples(Source(tmp_path))
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match="a folder of files of one of them"):
        read_samples(Source(tmp_path))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        read_samples(Source(write(tmp_path / "b.jsonl")), samples=0)
    with pytest.raises(ValueError, match="text excludes prompt"):
        Fields(text="a", prompt="b")
    with pytest.raises(ValueError, match="response needs prompt"):
        Fields(response="b")


# -- the Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """ROWS as cats/tales, in a cache as a download leaves it."""
    from datasets import SplitDict, SplitInfo
    from datasets.info import DatasetInfo

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "cache" / "cats___tales" / "default" / "0.0.0" / ("0" * 40)
    written = tmp_path / "written"
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(written))
    folder.mkdir(parents=True)
    next(written.glob("*.arrow")).rename(folder / "tales-train.arrow")
    splits = SplitDict({"train": SplitInfo("train", num_examples=50, dataset_name="tales")})
    DatasetInfo(
        features=data.features, builder_name="parquet", dataset_name="tales",
        config_name="default", version="0.0.0", splits=splits,
    ).write_to_directory(str(folder))  # fmt: skip
    return "cats/tales"


@pytest.mark.usefixtures("offline")
def test_a_name_on_the_hub(cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, with the rows that a file of them gives; a path wins over it."""
    source = Source(cached)
    assert source.on_hub
    here = read_samples(Source(write(tmp_path / "a.jsonl")), samples=5, seed=1)
    assert read_samples(source, samples=5, seed=1) == here
    with pytest.raises(ValueError, match="no data set 'cats/songs': neither a path here, nor"):
        read_samples(Source("cats/songs"))
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    Dataset.from_list([{"text": "here"}]).save_to_disk(cached)
    assert not source.on_hub
    assert read_samples(source) == [Sample("here")]


def test_a_streamed_name_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows come from a shuffled buffer, by the seed; subset and revision are asked for."""
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return Dataset.from_list(ROWS * 300).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(sources, "_least", None)
    source = Source("cats/tales", "test", "short", "v1", streaming=True)
    found = read_samples(source, samples=7, seed=1)
    assert asked[0] == (
        ("cats/tales", "short"), {"split": "test", "revision": "v1", "streaming": True}
    )  # fmt: skip
    assert len(found) == 7 and found == read_samples(source, samples=7, seed=1)
    assert found != read_samples(source, samples=7, seed=2)
    assert found != [Sample(row["text"]) for row in ROWS[:7]]
