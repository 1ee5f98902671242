"""What N GPUs would take, from what bench_scale.py measured: the pieces of a block, and a sum.

Of a block of the blockwise engine, by the processes that were measured, N0 (one, where one was):

    tokens      forward, recomputed forward, backward and moments, without what was waited for
    selection   energies, choices, A and B
    load        its bytes from disk or host memory to the GPU, once, what others read included
    disk        what was waited for the files of gradients and inputs
    reduce      the moments on their way to their owners, at the most processes that were measured

Of N processes each has 1/N of the samples, of the modules to choose for, of the bytes to read, and
of the gradients to write. Of the moments each sends and gets about as much whatever N is, and one
process none. Another model has other shapes: tokens go by the products of a token (6 m n, and p² a
moment, p the smaller side; attention is left out), selection by p² max(m, n) and p³, load by m n,
disk by the width, reduce by p². So

    block = max(tokens + selection + reduce, 2 load) + disk,      all = blocks × block.

What this leaves out: the head, preparing and writing; a disk or bus that the processes of a machine
share, of which N do not read N times as fast; the network between machines, where reduce and load
are those of a machine's own. A piece that was not measured is "needs measurement", and so is all
that would be made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapes import Shape

NEEDED = "needs measurement"
PIECES = ("tokens", "selection", "reduce", "load", "disk")

Number = float | None


def work_of(shape: Shape) -> dict[str, float]:
    """What each piece of a block goes by, in units of its own."""
    linears = list(shape.linears().values())
    sides = [(min(pair), max(pair)) for pair in linears]
    return {
        "tokens": float(sum(6 * p * q + 2 * p * p for p, q in sides)),
        "selection": float(sum(p * p * q + 3 * p**3 for p, q in sides)),
        "reduce": float(sum(2 * p * p for p, _ in sides)),
        "load": float(sum(m * n for m, n in linears)),
        "disk": float(shape.hidden),
    }


def pieces_of(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Number], int]:
    """Seconds of each piece of a block, None where nothing was measured; and N0."""
    mine = sorted(
        (row for row in rows if row["mode"] == "blockwise" and "error" not in row),
        key=lambda row: row["processes"],
    )
    if not mine:
        return dict.fromkeys(PIECES), 1
    first, last = mine[0], mine[-1]
    found: dict[str, Number] = {
        name: first[f"{name}_s"] for name in ("tokens", "selection", "load", "disk")
    }
    found["reduce"] = last["reduce_s"] if last["processes"] > 1 else None
    return found, first["processes"]


def predicted(
    rows: Sequence[Mapping[str, Any]], measured: Shape, shape: Shape, processes: int
) -> dict[str, Any]:
    """The pieces of a block of ``shape``, a block and all blocks, in seconds, by N processes.

    ``measured``: the shape that the rows are of.
    """
    pieces, n0 = pieces_of(rows)
    here, there = work_of(measured), work_of(shape)
    seconds: dict[str, Number] = {}
    for name, value in pieces.items():
        if name == "reduce":
            share = 1.0 if processes > 1 else 0.0
            value = 0.0 if processes == 1 else value
        else:
            share = n0 / processes
        seconds[name] = None if value is None else value * share * there[name] / here[name]
    block: Number = None
    if all(value is not None for value in seconds.values()):
        tokens, selection, reduce, load, disk = (seconds[name] or 0.0 for name in PIECES)
        block = max(tokens + selection + reduce, 2 * load) + disk
    whole = None if block is None else shape.blocks * block
    numbers = {**{f"{name}_s": seconds[name] for name in PIECES}, "block_s": block, "all_s": whole}
    return {
        "model": shape.title,
        "processes": processes,
        **{name: NEEDED if value is None else value for name, value in numbers.items()},
    }


def table(
    rows: Sequence[Mapping[str, Any]], measured: Shape, others: Sequence[Shape], most: int
) -> list[dict[str, Any]]:
    """Of the measured shape by 1, 2, 4, … processes, beside what was measured; of others by all.

    Nothing where no run of the blockwise engine was measured.
    """
    took = {
        row["processes"]: row["seconds"]
        for row in rows
        if row["mode"] == "blockwise" and "error" not in row
    }
    if not took:
        return []
    found = []
    for count in sorted({2**k for k in range(int(math.log2(most)) + 1)} | took.keys()):
        row = predicted(rows, measured, measured, count)
        found.append({**row, "measured_block_s": took.get(count, NEEDED)})
    for shape in others:
        row = predicted(rows, measured, shape, most)
        found.append({**row, "measured_block_s": NEEDED})
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds, and how many times as fast as the first row, over the processes; a line a mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if "error" not in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for mode in dict.fromkeys(row["mode"] for row in good):
        its = sorted((r for r in good if r["mode"] == mode), key=lambda row: row["processes"])
        left.plot([r["processes"] for r in its], [r["seconds"] for r in its], "o-", label=mode)
        fast = [r for r in its if isinstance(r.get("speedup"), float)]
        right.plot([r["processes"] for r in fast], [r["speedup"] for r in fast], "o-", label=mode)
    counts = sorted({row["processes"] for row in good})
    if counts:
        right.plot(counts, counts, ":", color="grey", label="N times")
        for axes in (left, right):
            axes.set_xticks(counts)
            axes.set_xlabel("processes, a GPU each")
            axes.legend()
    left.set_ylabel("seconds: all, or a block (blockwise)")
    left.set_yscale("log")
    right.set_ylabel("times as fast as the first")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
