"""The energies of every layer as a picture, the chosen directions marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from filet.report.modules import ModuleReport
from filet.system.names import split
from filet.system.text import elide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CHOSEN",
    "INK",
    "INNER",
    "MEDIAN",
    "MUTED",
    "OUTER",
    "PLOT_FILE",
    "WHOLE",
    "draw_panel",
    "label_decades",
    "log_range",
    "panels_of",
]

PLOT_FILE = "energies.png"
"""Name of the picture of the energies in an adapter's folder."""


INK = "#1f2933"


MUTED = "#616e7c"


_GRID = "#e4e7eb"


WHOLE = "#e6edf5"


OUTER = "#c2d4e8"


INNER = "#8aadd3"


MEDIAN = "#1d4e89"


CHOSEN = "#e8590c"


@dataclass(frozen=True)
class _Panel:
    """One panel: columns of the picture, each the modules of one kind in one layer."""

    title: str
    x_label: str
    positions: list[int]
    columns: list[list[ModuleReport]]
    names: list[str] | None = None


def _kind(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer, kind) of a module name: its first number, and the rest with numbers as ``*``."""
    place = split(name)
    if place.index is None:
        return None, ()
    rest = ("*" if part.isdecimal() else part for part in place.rest)
    return place.index, (*place.path, "*", *rest)


def panels_of(modules: Sequence[ModuleReport]) -> list[_Panel]:
    """Group modules by kind, in the model's order; those outside any layer come last."""
    kinds: dict[tuple[str, ...], dict[int, list[ModuleReport]]] = {}
    alone: list[ModuleReport] = []
    for module in modules:
        layer, kind = _kind(module.name)
        if layer is None:
            alone.append(module)
        else:
            kinds.setdefault(kind, {}).setdefault(layer, []).append(module)
    panels = [
        _Panel(title, "layer", sorted(layers), [layers[layer] for layer in sorted(layers)])
        for title, layers in zip(_titles(list(kinds)), kinds.values(), strict=True)
    ]
    if alone:
        panels.append(
            _Panel(
                title=alone[0].name if len(alone) == 1 else "outside the layers",
                x_label="module",
                positions=list(range(len(alone))),
                columns=[[module] for module in alone],
                names=[module.name.rsplit(".", 1)[-1] for module in alone],
            )
        )
    return panels


def _titles(kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest tail of each kind that no other kind shares."""
    titles: list[str] = []
    for kind in kinds:
        length = 1
        while length < len(kind) and any(
            other != kind and other[-length:] == kind[-length:] for other in kinds
        ):
            length += 1
        titles.append(elide(".".join(kind[-length:]), 34))
    return titles


def log_range(modules: Sequence[ModuleReport]) -> tuple[float, float, float, bool]:
    """(where zeros go, lower limit, upper limit) of log10 energies, and whether a zero exists."""
    energies = torch.cat([module.candidates().double() for module in modules])
    positive = energies[energies > 0]
    has_zero = bool((energies <= 0).any())
    if positive.numel() == 0:
        return -1.0, -1.5, 0.5, has_zero
    low, high = float(positive.min().log10()), float(positive.max().log10())
    span = max(high - low, 1.0)
    floor = low - 0.09 * span
    return floor, (floor if has_zero else low) - 0.04 * span, high + 0.04 * span, has_zero


def _log(energies: torch.Tensor, floor: float) -> torch.Tensor:
    """log10 of the finite energies, zeros at ``floor``."""
    finite = energies[torch.isfinite(energies)].double()
    return torch.where(finite > 0, finite, 1.0).log10().masked_fill(finite <= 0, floor)


def draw_panel(axes: Axes, panel: _Panel, floor: float) -> None:
    """Bands, median and chosen marks of one panel."""
    from matplotlib.ticker import MaxNLocator

    levels = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], dtype=torch.float64)
    quantiles = torch.full((len(panel.columns), 7), float("nan"), dtype=torch.float64)
    marks_x: list[float] = []
    marks_y: list[float] = []
    for row, (position, modules) in enumerate(zip(panel.positions, panel.columns, strict=True)):
        values = _log(torch.cat([module.energies for module in modules]), floor).sort().values
        if values.numel():
            # By hand: torch.quantile refuses more than 2**24 values.
            at = (levels * (values.numel() - 1)).round().long()
            quantiles[row] = values[at]
        chosen = _log(torch.cat([module.chosen() for module in modules]), floor)
        marks_x += [float(position)] * chosen.numel()
        marks_y += chosen.tolist()

    band = quantiles.numpy()
    x = panel.positions
    width = 1.0 if len(x) > 12 else 0.86
    edge = {"edgecolor": "white", "linewidth": 0.4} if len(x) <= 48 else {"linewidth": 0.0}
    for low, colour in enumerate((WHOLE, OUTER, INNER)):
        extent = band[:, 6 - low] - band[:, low]
        axes.bar(x, extent, width, bottom=band[:, low], color=colour, **edge)
    half = width / 2 - 0.04
    axes.hlines(
        band[:, 3],
        [position - half for position in x],
        [position + half for position in x],
        colors=MEDIAN,
        linewidths=1.5,
    )
    axes.hlines(
        marks_y,
        [position - 0.32 * width for position in marks_x],
        [position + 0.32 * width for position in marks_x],
        colors=CHOSEN,
        linewidths=0.7,
        alpha=0.9,
        zorder=3,
    )
    axes.set_title(panel.title, loc="left", fontsize=9.5, color=INK, pad=5)
    axes.set_xlim(min(x) - 0.7, max(x) + 0.7)
    if len(x) == 1:
        axes.set_xlim(x[0] - 2, x[0] + 2)
    if panel.names is not None and len(x) <= 8:
        axes.set_xticks(x, [elide(name, 12) for name in panel.names])
    elif len(x) <= 8:
        axes.set_xticks(x, [str(position) for position in x])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def label_decades(axes: Axes, bottom: float, top: float, zero: float | None) -> None:
    """Ticks at whole decades of an axis that is linear in log10; ``zero`` gets its own."""
    first, last = int(-(-bottom // 1)), int(top // 1)
    step = max(1, -(-(last - first + 1) // 6))
    ticks = [
        float(decade)
        for decade in range(first, last + 1)
        if decade % step == 0 and (zero is None or decade - zero > 0.05 * (top - bottom))
    ]
    labels = [f"$10^{{{int(decade)}}}$" for decade in ticks]
    if zero is not None:
        ticks, labels = [zero, *ticks], ["0", *labels]
    axes.set_yticks(ticks, labels)
