"""The pictures: each function takes lines of one CSV file and writes a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from effect.groups import KEYS, SCALES
from effect.overlap import Overlap
from effect.records import ALL
from effect.summaries import (
    SCALINGS,
    SELECTIONS,
    Cell,
    Correlation,
    Difference,
    GroupLine,
    Point,
    verdict,
)
from effect.sweeps import BY_RANK
from effect.tables import label

__all__ = ["draw_groups", "draw_overlaps", "draw_points", "draw_table4"]

_INK, _MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_LINES = ("#616e7c", "#8aadd3", "#1d4e89", "#2f9e44", "#e8590c")
_COLOURS = dict(zip(map(label, BY_RANK), _LINES, strict=True))
_OF_SELECTION = {"M": "#1d4e89", "R": "#8aadd3", "P": "#e8590c"}
_KEYS = {"sigma": "σ", "energy": "energy"}
_SCALES = {"min": "minimal", "max": "maximal"}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Without pyplot, whose backend is the user's."""
    figure = Figure(
        figsize=(width * columns, height * rows), dpi=130, facecolor="white", layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=9)
        each.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _half(half: float) -> float:
    """Of an interval; none is drawn of a single pair."""
    return half if math.isfinite(half) else 0.0


def draw_table4(cells: Sequence[Cell], differences: Sequence[Difference], path: Path) -> None:
    """A row a task: the losses of the nine cells, and the differences with intervals."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure, axes = _figure(len(tasks), 2, 5.2, 3.4)
    for task, (left, right) in zip(tasks, axes, strict=True):
        of = [d for d in differences if d.task == task and d.measure == "loss"]
        _cells(left, [cell for cell in cells if cell.task == task])
        _differences(right, of)
        left.set_title(task, loc="left", fontsize=10, color=_INK)
        word = verdict(of).partition(":")[0]
        right.set_title(f"M < R < P: {word}", loc="left", fontsize=10, color=_INK)
    axes[0][0].legend(title="selection", fontsize=8, title_fontsize=8, frameon=False)
    _save(figure, path)


def _cells(axes: Any, cells: Sequence[Cell]) -> None:
    for place, selection in enumerate(SELECTIONS):
        of = [cell for cell in cells if cell.selection == selection]
        x = [SCALINGS.index(cell.scaling) + (place - 1) * 0.2 for cell in of]
        y = [cell.loss for cell in of]
        axes.scatter(x, y, s=45, color=_OF_SELECTION[selection], label=selection)
        for at, cell in zip(x, of, strict=True):
            text = f"{cell.loss:.3f}" + ("" if cell.inside else "*")
            axes.annotate(
                text, (at, cell.loss), (0, 6), textcoords="offset points", fontsize=7, ha="center"
            )
    axes.set_xticks(range(len(SCALINGS)), SCALINGS)
    axes.set_xlim(-0.5, len(SCALINGS) - 0.5)
    axes.margins(y=0.15)
    axes.set_ylabel("loss at the best rate, nats a token", fontsize=9)
    seeds = sorted({cell.seeds for cell in cells})
    note = f"{' to '.join(map(str, seeds))} seed{'s' * (seeds != [1])}"
    note += "" if all(cell.inside for cell in cells) else "; *: the best rate is outermost"
    axes.set_xlabel(f"scaling ({note})", fontsize=9)
    axes.grid(axis="y", color=_GRID)


def _differences(axes: Any, differences: Sequence[Difference]) -> None:
    names = []
    for row, d in enumerate(differences):
        colour = _OF_SELECTION["M" if d.pair.startswith("M") else "P"]
        axes.errorbar(d.mean, row, xerr=_half(d.half), fmt="o", color=colour, capsize=3)
        names.append(f"{d.pair}  {d.scaling}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    pairs = sorted({d.pairs for d in differences})
    interval = "95% intervals" if pairs and pairs[0] > 1 else "one pair, no interval"
    axes.set_xlabel(f"difference of losses, {interval}", fontsize=9)
    axes.grid(axis="x", color=_GRID)


def draw_groups(lines: Sequence[GroupLine], found: Sequence[Correlation], path: Path) -> None:
    """Of one task: a panel a sort and scale, the group to the right and its loss upwards."""
    figure, axes = _figure(len(KEYS), len(SCALES), 4.6, 3.2)
    rho = {(one.key, one.scale): one for one in found}
    for row, key in zip(axes, KEYS, strict=True):
        for panel, scale in zip(row, SCALES, strict=True):
            of = [line for line in lines if (line.key, line.scale) == (key, scale)]
            finite = [line for line in of if math.isfinite(line.loss)]
            panel.scatter(
                [x.number for x in finite], [x.loss for x in finite], s=18, color="#1d4e89"
            )
            _diverged(panel, [x.number for x in of if not math.isfinite(x.loss)])
            title = f"sorted by {_KEYS[key]}, {_SCALES[scale]} scale"
            if (key, scale) in rho:
                one = rho[key, scale]
                title += f": ρ = {one.rho:+.2f} (p = {one.p:.1g})"
            panel.set_title(title, loc="left", fontsize=9, color=_INK)
            panel.set_xlabel(f"group, 0 has the largest {_KEYS[key]}", fontsize=9)
            panel.set_ylabel("loss, nats a token", fontsize=9)
            panel.grid(color=_GRID)
    if lines:
        figure.suptitle(
            f"{lines[0].task}: one group of singular directions trained at a time; ρ of its key "
            "with the loss",
            fontsize=10,
        )
    _save(figure, path)


def _diverged(axes: Any, numbers: Sequence[int]) -> None:
    """Marks on the upper edge, where a loss has no place."""
    if numbers:
        axes.plot(
            numbers,
            [1.0] * len(numbers),
            "^",
            color="#e8590c",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="diverged",
        )
        axes.legend(fontsize=8, frameon=False)


def draw_points(points: Sequence[Point], by: str, path: Path) -> None:
    """Of one task, by "rank" or "samples": loss, its difference to LoRA, and general loss."""
    figure, axes = _figure(1, 3, 4.4, 3.6)
    values = sorted({getattr(point, by) for point in points}, key=lambda v: (v == ALL, v))
    panels: list[tuple[str, Callable[[Point], float], bool]] = [
        ("loss, nats a token", lambda point: point.loss, False),
        ("loss less LoRA's at that rank, 95%", lambda point: point.difference, True),
        ("general loss", lambda point: point.general, False),
    ]
    for axis, (title, y, interval) in zip(axes[0], panels, strict=True):
        for place, (start, colour) in enumerate(_COLOURS.items()):
            of = [
                p for value in values for p in points if (p.start, getattr(p, by)) == (start, value)
            ]
            if of:
                x = [values.index(getattr(p, by)) + (place - 2) * 0.05 for p in of]
                half = [_half(p.half) if interval else 0.0 for p in of]
                line = {"linewidth": 1.2, "marker": "o", "markersize": 4, "capsize": 2}
                axis.errorbar(x, [y(p) for p in of], half, color=colour, label=start, **line)
        axis.set_xticks(range(len(values)), ["all" if v == ALL else str(v) for v in values])
        axis.set_xlabel(by, fontsize=9)
        axis.set_title(title, loc="left", fontsize=9, color=_INK)
        axis.grid(color=_GRID)
    axes[0][1].axhline(0, color=_INK, linewidth=0.8)
    axes[0][0].legend(fontsize=7, frameon=False)
    seeds = sorted({point.seeds for point in points})
    figure.suptitle(f"{points[0].task}: {' to '.join(map(str, seeds))} seeds", fontsize=10)
    _save(figure, path)


def draw_overlaps(lines: Sequence[Overlap], path: Path) -> None:
    """A row a method: tasks against tasks, and modules by layer for pairs of different tasks."""
    methods = list(dict.fromkeys(line.method for line in lines))
    figure, axes = _figure(len(methods), 2, 5.4, 3.2)
    for method, (left, right) in zip(methods, axes, strict=True):
        of = [line for line in lines if line.method == method]
        random = sum(line.random for line in of) / len(of)
        tasks, between = _by_task(of)
        modules, within = _by_layer([line for line in of if line.task != line.other])
        most = max(value for row in (*between, *within) for value in row if math.isfinite(value))
        _image(left, between, most)
        for i, row in enumerate(between):
            for j, value in enumerate(row):
                colour = "white" if value < 0.6 * most else _INK
                left.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour)
        left.set_xticks(range(len(tasks)), tasks)
        left.set_yticks(range(len(tasks)), tasks)
        left.set_xlabel("diagonal: another sample of the same task", fontsize=8)
        left.set_title(f"{method} (random: {random:.3f})", loc="left", fontsize=9, color=_INK)
        picture = _image(right, within, most)
        right.set_yticks(range(len(modules)), modules)
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_xlabel("layer", fontsize=9)
        right.set_title("mean over pairs of different tasks", loc="left", fontsize=9, color=_INK)
        figure.colorbar(picture, ax=[left, right], label="mean squared cosine", shrink=0.9)
    _save(figure, path)


def _by_task(lines: Sequence[Overlap]) -> tuple[list[str], list[list[float]]]:
    """Means over the layers, by task and task."""
    tasks = list(dict.fromkeys(line.task for line in lines))
    grid = [[math.nan] * len(tasks) for _ in tasks]
    for i, task in enumerate(tasks):
        for j, other in enumerate(tasks):
            of = [x.overlap for x in lines if (x.task, x.other) in ((task, other), (other, task))]
            grid[i][j] = sum(of) / len(of)
    return tasks, grid


def _by_layer(lines: Sequence[Overlap]) -> tuple[list[str], list[list[float]]]:
    """Means over pairs, by module and layer: the last part of a name and the first number in it."""
    by: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        number = re.search(r"\d+", line.layer)
        place = (line.layer.rpartition(".")[2], int(number.group()) if number else 0)
        by.setdefault(place, []).append(line.overlap)
    modules = list(dict.fromkeys(module for module, _ in by))
    grid = [[math.nan] * (1 + max(layer for _, layer in by)) for _ in modules]
    for (module, layer), of in by.items():
        grid[modules.index(module)][layer] = sum(of) / len(of)
    return modules, grid


def _image(axes: Any, grid: Sequence[Sequence[float]], most: float) -> Any:
    axes.spines[:].set_visible(False)
    return axes.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto")
