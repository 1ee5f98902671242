"""``filet stats --shard`` on machines that know nothing of each other, and ``--merge`` of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_cases import arguments, error_of, without_data

import filet
from filet.cli.main import main


def shard(stats: list[str], data: Path, number: int, of: int, output: Path, *more: str) -> Path:
    path = output / f"{number}.safetensors"
    where = arguments("--data", data, "--shard", f"{number}/{of}", "--output", path)
    assert main([*stats, *where, *more]) == 0
    return path


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_shards_merge_to_the_whole(
    keep: bool, stats: list[str], data: Path, tmp_path: Path
) -> None:
    more = arguments("--keep", data) if keep else []
    files = [shard(stats, data, number, 3, tmp_path, *more) for number in (2, 3, 1)]
    apart = [filet.Statistics.load(path) for path in files]
    assert [its.samples for its in apart] == [8, 8, 8]
    merged, whole = tmp_path / "merged.safetensors", tmp_path / "whole.safetensors"
    assert main(arguments("stats", "--merge", *files, "--output", merged)) == 0
    assert main([*stats, *arguments("--data", data, "--output", whole), *more]) == 0
    mine, theirs = filet.Statistics.load(merged), filet.Statistics.load(whole)
    assert mine.shards is None and theirs.shards is None
    for key in (
        "samples",
        "tokens",
        "loss_terms",
        "data",
        "keep_samples",
        "keep_tokens",
        "fingerprints",
    ):
        assert getattr(mine, key) == getattr(theirs, key), key
    for name, its in theirs.moments.items():
        both = [(mine.moments[name].input, its.input), (mine.moments[name].output, its.output)]
        both += [(mine.keep[name], theirs.keep[name])] if mine.keep and theirs.keep else []
        assert len(both) == (3 if keep else 2)
        for one, other in both:
            assert int(one.count) == int(other.count)
            largest = float(other.sum.abs().max())
            torch.testing.assert_close(one.sum, other.sum, rtol=1e-5, atol=1e-5 * largest)


def test_shards_that_do_not_belong_together(
    init: list[str],
    stats: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    first = shard(stats, data, 1, 3, tmp_path)
    second = shard(stats, data, 2, 3, tmp_path)
    whole = tmp_path / "whole.safetensors"
    assert main([*stats, *arguments("--data", data, "--output", whole)]) == 0
    merged = tmp_path / "merged.safetensors"
    for file, said in (
        (second, "shard 3 of 3 is missing; expected the files of all shards"),
        (first, "shard 1 of 3 is there twice; expected each of the shards once"),
        (shard(stats, data, 2, 2, tmp_path / "a"), "cannot merge shard 1 of 3 with shard 2 of 2"),
        (shard(stats, other, 2, 3, tmp_path / "b"), "--data is '"),
        (shard(stats, data, 2, 3, tmp_path / "c", "--max-length", "5"), "--data is '"),
        (shard(stats, data, 2, 3, tmp_path / "d", "--keep", str(data)), "--keep is 'none' there"),
        (whole, "cannot merge statistics of shard 1 of 3 with those of no shard, or of all"),
    ):
        message = error_of(capsys, arguments("stats", "--merge", first, file, "--output", merged))
        assert said in message
        assert not merged.exists()
    message = error_of(capsys, [*without_data(init), "--statistics", str(first)])
    assert "are of shard 1 of 3 alone; expected those of all shards" in message
    message = error_of(
        capsys, [*stats, *arguments("--data", data, "--shard", "1/25", "--output", merged)]
    )
    assert "--data has 24 samples; expected one or more for each shard" in message


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/x", "a/b", "-1/2"])
def test_what_is_no_shard(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["stats", "--model", "m", "--data", "d", "--output", "o", f"--shard={text}"])
    assert ended.value.code == 2
    assert f"must be I/N with 1 <= I <= N, got {text!r}" in capsys.readouterr().err
