"""The paper's Table 4, Figures 1, 3 and 5, and the overlap of tasks: CSV files and pictures.

    python benchmarks/effect/figures.py benchmarks/results/effect

Numbers come from the records in the folder (run.py --round table4, groups, ranks, samples), and are
written to the folder's "figures". What overlap.py has written there as overlap.csv is drawn too.
Tables are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

from effect.draw import draw_groups, draw_overlaps, draw_points, draw_table4
from effect.lines import read_lines, write_lines
from effect.overlap import Overlap
from effect.records import Record, read
from effect.summaries import (
    Cell,
    Correlation,
    Difference,
    GroupLine,
    Point,
    correlations,
    group_lines,
    points,
    table4,
    verdict,
)
from effect.sweeps import BY_RANK, BY_SAMPLES, RANKS, SAMPLE_COUNTS
from effect.tables import Interval, table

__all__ = ["main"]


def _table4(records: Sequence[Record], tasks: Sequence[str], folder: Path) -> None:
    cells: list[Cell] = []
    differences: list[Difference] = []
    for task in tasks:
        of, between = table4(records, task)
        cells += of
        differences += between
        if of:
            print(f"\n## Table 4, {task}\n\n{table(_TABLE4, _rows(of, between))}\n")
            print(verdict(between))
    if cells:
        write_lines(folder / "table4.csv", Cell, cells)
        write_lines(folder / "table4-differences.csv", Difference, differences)
        draw_table4(cells, differences, folder / "table4.png")


def _rows(cells: Sequence[Cell], differences: Sequence[Difference]) -> list[list[str]]:
    """A row a scaling: the losses of M, R and P, and the two differences."""
    rows = []
    for scaling in dict.fromkeys(cell.scaling for cell in cells):
        row = [scaling]
        for selection in "MRP":
            of = [c for c in cells if (c.selection, c.scaling) == (selection, scaling)]
            row.append(f"{of[0].loss:.4f}" + ("" if of[0].inside else " (edge)") if of else "")
        for pair in ("M − R", "R − P"):
            its = [
                str(Interval(d.mean, d.half, d.pairs))
                for d in differences
                if (d.scaling, d.pair, d.measure) == (scaling, pair, "loss")
            ]
            row += its or [""]
        seeds = sorted({cell.seeds for cell in cells if cell.scaling == scaling})
        rows.append([*row, "–".join(map(str, seeds))])
    return rows


def _groups(records: Sequence[Record], tasks: Sequence[str], folder: Path) -> None:
    found: list[Correlation] = []
    every: list[GroupLine] = []
    for task in tasks:
        lines = group_lines(records, task)
        if lines:
            of = correlations(lines)
            draw_groups(lines, of, folder / f"groups-{task}.png")
            every += lines
            found += of
    if every:
        write_lines(folder / "groups.csv", GroupLine, every)
        write_lines(folder / "groups-correlations.csv", Correlation, found)
        rows = [
            [c.task, c.key, c.scale, str(c.groups), f"{c.rho:+.2f}", f"{c.p:.1g}"] for c in found
        ]
        print(f"\n## Groups of singular directions\n\n{table(_GROUPS, rows)}")


def _curves(records: Sequence[Record], tasks: Sequence[str], folder: Path) -> None:
    """Of what was run at more than one rank, or with more than one number of samples."""
    for name, by in (("ranks", "rank"), ("samples", "samples")):
        every: list[Point] = []
        for task in tasks:
            of = (
                points(records, task, BY_RANK, ranks=RANKS)
                if by == "rank"
                else points(records, task, BY_SAMPLES, samples=SAMPLE_COUNTS)
            )
            if len({getattr(point, by) for point in of}) > 1:
                draw_points(of, by, folder / f"{name}-{task}.png")
                every += of
        if every:
            write_lines(folder / f"{name}.csv", Point, every)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the records; figures/ in it is written")
    options = parser.parse_args(argv)
    records, folder = read(options.folder), options.folder / "figures"
    tasks = list(dict.fromkeys(record.task for record in records))
    _table4(records, tasks, folder)
    _groups(records, tasks, folder)
    _curves(records, tasks, folder)
    overlaps = folder / "overlap.csv"
    if overlaps.exists():
        draw_overlaps(read_lines(overlaps, Overlap), folder / "overlap.png")


_TABLE4 = ["scaling", "M", "R", "P", "M − R", "R − P", "seeds"]
_GROUPS = ["task", "sorted by", "scale", "groups", "ρ of key and loss", "p"]

if __name__ == "__main__":
    main()
