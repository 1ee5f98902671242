"""The energies of every layer as a picture, the chosen directions marked.

One panel a kind of module (``q_proj``, ``down_proj``, ...), the layer to the right and the energy
upwards on a log scale: bands for all directions, the middle 90 % and the middle half of them, the
median, and a mark for every chosen direction. Zero energies are drawn on a line below the smallest
positive one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from filet.report.modules import ModuleReport
from filet.system.names import split
from filet.system.text import elide, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "MUTED",
    "LogRange",
    "Panel",
    "caption_of",
    "log10_energies",
    "log_range",
    "panels_of",
    "picture",
    "ticks_of",
]

_TITLE = "FILet: sensitivity of the loss to each direction"
_TITLE_OF_CONTRAST = "FILet: the task against what is kept, along each chosen direction"

# Colours: text, then lines, then bands from the widest to the narrowest, then marks.
INK, MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_WHOLE, _OUTER, _INNER = "#e6edf5", "#c2d4e8", "#8aadd3"
_MEDIAN, _CHOSEN = "#1d4e89", "#e8590c"

_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # the quantiles that the bands and median end at


def picture(modules: Sequence[ModuleReport], caption: str) -> bytes:
    """The energies of these modules, at least one, as a PNG file; ``caption`` is below the title.

    Raises ImportError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing the energies needs matplotlib: pip install 'filet-kernels[frontend]'"
        ) from error

    panels = panels_of(modules)
    layout = _Layout(len(panels))
    figure = Figure(figsize=(layout.width, layout.height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # without pyplot, whose backend is the user's
    contrast = any(module.kind == "contrast" for module in modules)
    label = "eigenvalue" if contrast else "Fisher energy"
    _draw_panels(figure, layout, panels, log_range(modules), label)
    _draw_title(figure, layout, _TITLE_OF_CONTRAST if contrast else _TITLE, caption)
    _draw_legend(figure, layout, contrast)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def caption_of(modules: Sequence[ModuleReport], select: str, samples: int, tokens: int) -> str:
    """What the picture shows: how many modules and directions, which ones, from how much data."""
    ranks = sorted({module.rank for module in modules})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    which = {
        "min": "lowest energies",
        "max": "highest energies",
        "random": "random choice",
        "contrast": "largest task over data to keep",
    }
    choice = which.get(select, "chosen directions")
    text = f"{plural(len(modules), 'module')}, rank {rank}, {choice}"
    if samples:
        text += f", {plural(samples, 'sample')}, {plural(tokens, 'token')}"
    return text


@dataclass(frozen=True)
class Panel:
    """One panel: columns of the picture, each the modules of one kind in one layer."""

    title: str
    x_label: str
    positions: list[int]
    columns: list[list[ModuleReport]]
    names: list[str] | None = None


def panels_of(modules: Sequence[ModuleReport]) -> list[Panel]:
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
        Panel(title, "layer", sorted(layers), [layers[layer] for layer in sorted(layers)])
        for title, layers in zip(_titles(list(kinds)), kinds.values(), strict=True)
    ]
    if alone:
        panels.append(
            Panel(
                title=alone[0].name if len(alone) == 1 else "outside the layers",
                x_label="module",
                positions=list(range(len(alone))),
                columns=[[module] for module in alone],
                names=[module.name.rsplit(".", 1)[-1] for module in alone],
            )
        )
    return panels


def _kind(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer, kind) of a module name: its first number, and the rest with numbers as ``*``."""
    place = split(name)
    if place.index is None:
        return None, ()
    rest = ("*" if part.isdecimal() else part for part in place.rest)
    return place.index, (*place.path, "*", *rest)


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


@dataclass(frozen=True)
class LogRange:
    """The vertical axis, in log10 of the energies.

    Attributes:
        floor: where zeros are drawn, below the smallest positive energy.
        bottom, top: limits of the axis.
        has_zero: whether there is a zero.
    """

    floor: float
    bottom: float
    top: float
    has_zero: bool


def log_range(modules: Sequence[ModuleReport]) -> LogRange:
    """The axis that has room for every energy of these modules."""
    energies = torch.cat([module.candidates().double() for module in modules])
    positive = energies[energies > 0]
    has_zero = bool((energies <= 0).any())
    if positive.numel() == 0:
        return LogRange(-1.0, -1.5, 0.5, has_zero)
    low, high = float(positive.min().log10()), float(positive.max().log10())
    span = max(high - low, 1.0)
    floor = low - 0.09 * span
    bottom = (floor if has_zero else low) - 0.04 * span
    return LogRange(floor, bottom, high + 0.04 * span, has_zero)


def ticks_of(limits: LogRange) -> tuple[list[float], list[str]]:
    """Places and labels of the axis: whole decades, or between them where fewer than two are seen.

    Zero has its own.
    """
    zero = limits.floor if limits.has_zero else None
    lowest = limits.bottom if zero is None else zero + 0.05 * (limits.top - limits.bottom)
    decades = range(math.floor(limits.bottom), math.floor(limits.top) + 1)
    step = max(1, -(-(len(decades) - 1) // 6))
    places: list[float] = []
    labels: list[str] = []
    for digits in ((10,), (10, 20, 50), range(10, 100, 10), range(10, 100)):
        found = [(k, d / 10) for k in decades if k % step == 0 for d in digits]
        seen = [(k, d) for k, d in found if lowest <= k + math.log10(d) <= limits.top]
        places = [k + math.log10(d) for k, d in seen]
        labels = [_power(k, d, whole=len(digits) == 1) for k, d in seen]
        if len(places) > 1:
            break
    return (places, labels) if zero is None else ([zero, *places], ["0", *labels])


def _power(decade: int, digits: float, whole: bool) -> str:
    if whole:
        return f"$10^{{{decade}}}$"
    if -3 <= decade <= 3:
        return f"{digits * 10.0**decade:.6g}"
    return f"${digits:g}\\cdot 10^{{{decade}}}$"


def log10_energies(energies: torch.Tensor, floor: float) -> torch.Tensor:
    """log10 of the finite energies, zeros at ``floor``."""
    finite = energies[torch.isfinite(energies)].double()
    return torch.where(finite > 0, finite, 1.0).log10().masked_fill(finite <= 0, floor)


class _Layout:
    """Sizes of a picture of so many panels, in inches, and their columns and rows."""

    def __init__(self, panels: int) -> None:
        self.columns = min(panels, 4)
        self.rows = -(-panels // self.columns)
        self.width = max(6.4, 3.3 * self.columns + 0.5)
        self.wide = self.width > 8  # room for the legend beside the title
        self.header = 0.98 if self.wide else 1.24
        self.height = 2.5 * self.rows + 0.37 + self.header
        self.left = 0.68 / self.width  # of the panels and the title, a part of the width


def _draw_panels(
    figure: Figure, layout: _Layout, panels: Sequence[Panel], limits: LogRange, label: str
) -> None:
    width, height = layout.width, layout.height
    grid = figure.subplots(layout.rows, layout.columns, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=layout.left,
        right=1 - 0.2 / width,
        top=1 - layout.header / height,
        bottom=0.55 / height,
        wspace=0.06,
        hspace=0.34 if layout.rows > 1 else 0.2,
    )
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        _draw_panel(axes, panels[index], limits.floor)
        axes.set_ylim(limits.bottom, limits.top)
        if index + layout.columns >= len(panels):
            axes.set_xlabel(panels[index].x_label, fontsize=8.5, color=INK)
    grid[0][0].set_yticks(*ticks_of(limits))
    for axes in grid[:, 0]:
        axes.set_ylabel(label, fontsize=8.5, color=INK)


def _draw_panel(axes: Axes, panel: Panel, floor: float) -> None:
    """Bands, median and chosen marks of one panel; marks alone where nothing else is known."""
    x = panel.positions
    width = 1.0 if len(x) > 12 else 0.86
    if not any(module.kind == "contrast" for modules in panel.columns for module in modules):
        _draw_bands(axes, panel, floor, width)
    marks_x, marks_y = _marks(panel, floor)
    axes.hlines(
        marks_y,
        [position - 0.32 * width for position in marks_x],
        [position + 0.32 * width for position in marks_x],
        colors=_CHOSEN,
        linewidths=0.7,
        alpha=0.9,
        zorder=3,
    )
    _draw_axes(axes, panel)


def _draw_bands(axes: Axes, panel: Panel, floor: float, width: float) -> None:
    """Where the energies of all directions lie, and their median."""
    x = panel.positions
    band = _quantiles(panel, floor).numpy()
    edge: dict[str, Any] = {"linewidth": 0.0}
    if len(x) <= 48:
        edge = {"edgecolor": "white", "linewidth": 0.4}
    for low, colour in enumerate((_WHOLE, _OUTER, _INNER)):
        extent = band[:, 6 - low] - band[:, low]
        axes.bar(x, extent, width, bottom=band[:, low], color=colour, **edge)
    half = width / 2 - 0.04
    axes.hlines(
        band[:, 3],
        [position - half for position in x],
        [position + half for position in x],
        colors=_MEDIAN,
        linewidths=1.5,
    )


def _quantiles(panel: Panel, floor: float) -> torch.Tensor:
    """log10 energies at ``_LEVELS`` of every column, (columns, 7) float64; NaN for an empty one."""
    levels = torch.tensor(_LEVELS, dtype=torch.float64, device="cpu")
    found = levels.new_full((len(panel.columns), len(levels)), float("nan"))
    for row, modules in enumerate(panel.columns):
        energies = torch.cat([module.energies for module in modules])
        values = log10_energies(energies, floor).sort().values
        if values.numel():
            # By hand: torch.quantile refuses more than 2**24 values.
            found[row] = values[(levels * (values.numel() - 1)).round().long()]
    return found


def _marks(panel: Panel, floor: float) -> tuple[list[float], list[float]]:
    """Position and log10 energy of every chosen direction."""
    x: list[float] = []
    y: list[float] = []
    for position, modules in zip(panel.positions, panel.columns, strict=True):
        chosen = log10_energies(torch.cat([module.chosen() for module in modules]), floor)
        x += [float(position)] * chosen.numel()
        y += chosen.tolist()
    return x, y


def _draw_axes(axes: Axes, panel: Panel) -> None:
    """Title, horizontal axis and grid of one panel."""
    from matplotlib.ticker import MaxNLocator

    x = panel.positions
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


def _draw_title(figure: Figure, layout: _Layout, title: str, caption: str) -> None:
    figure.text(
        layout.left,
        1 - 0.2 / layout.height,
        title,
        fontsize=12.5,
        fontweight="bold",
        color=INK,
        va="top",
    )
    y = 1 - 0.46 / layout.height
    figure.text(layout.left, y, caption, fontsize=8.5, color=MUTED, va="top")


def _draw_legend(figure: Figure, layout: _Layout, contrast: bool) -> None:
    """Beside the title where there is room, else below it."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color=_CHOSEN, lw=1.6, label="chosen")]
    others = [
        Line2D([], [], color=_MEDIAN, lw=1.6, label="median"),
        Patch(facecolor=_INNER, label="25-75 %"),
        Patch(facecolor=_OUTER, label="5-95 %"),
        Patch(facecolor=_WHOLE, label="all directions"),
    ]
    handles += [] if contrast else others
    anchor = (layout.left, 1 - 0.68 / layout.height)
    if layout.wide:
        anchor = (1 - 0.14 / layout.width, 1 - 0.16 / layout.height)
    figure.legend(
        handles=handles,
        loc="upper right" if layout.wide else "upper left",
        bbox_to_anchor=anchor,
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.4,
        borderaxespad=0.0,
        borderpad=0.2,
    )
