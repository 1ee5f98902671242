"""benchmarks/bench_qlora.py on a tiny shape: what it writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.parametrize(
    "more", [[], ["--double-quant", "--no-bare", "--kind", "fp4"], ["--checkpointing"]]
)
def test_bench_qlora(more: list[str], tmp_path: Path) -> None:
    import bench_qlora

    options = [
        "--shape",
        "tiny",
        "--samples",
        "8",
        "--length",
        "24",
        "--rounds",
        "1",
        "--rank",
        "4",
    ]
    bench_qlora.main([*options, *more, "--output", str(tmp_path)])
    checkpointing = "--checkpointing" in more
    name = "qlora_tiny_checkpointing.csv" if checkpointing else "qlora_tiny.csv"
    with open(tmp_path / name, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"][:3] for row in rows] == ["(a)", "(b)", "ene", "(c)", "ene", "(b)"]
    assert {row["kind"] for row in rows} == {"fp4" if "fp4" in more else "nf4"}
    assert {row["checkpointing"] for row in rows} == {str(checkpointing)}
    seconds = [float(row["seconds"]) for row in rows]
    assert 0 < seconds[2] and 0 < seconds[4] < seconds[3]
    assert seconds[5] == pytest.approx(seconds[1] + seconds[3])
    if "--no-bare" not in more:
        assert float(rows[1]["times_bare"]) == pytest.approx(seconds[1] / seconds[0])
    # Two blocks; a moment of q, k and v's x, o's, gate and up's and down's y, and of each one's g
    # or h, 32² for k and v's and 64² for the rest.
    assert float(rows[0]["moments_GiB"]) * 2**30 == 2 * 4 * (2 * 32**2 + 9 * 64**2)
