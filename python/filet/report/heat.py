"""How alike two adapters are, as a picture: a row a kind of module, a column a layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from filet.report.plot import INK, MUTED
from filet.system.names import split

__all__ = ["heat_map"]


def heat_map(values: Sequence[tuple[str, float | None]], title: str) -> bytes:
    """Values up to 1 of modules, by their names, as a PNG file; nothing where one is not known.

    The colours are of the values from 0, or from the tenth below the least: moments are all alike.

    Modules outside of the layers are in the first column, and a layer's experts are one cell, their
    mean. Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    cells: dict[str, dict[int, list[float]]] = {}
    places = {name: split(name) for name, _ in values}
    several = len({place.path for place in places.values()}) > 1  # encoder and decoder
    for name, value in values:
        place = places[name]
        parts = [*(place.path if several else ()), *place.rest]
        kind = ".".join("*" if part.isdecimal() else part for part in parts)  # of all experts
        its = cells.setdefault(kind, {}).setdefault(place.index or 0, [])
        its += [] if value is None else [value]
    last = max(index for its in cells.values() for index in its)
    grid = [
        [sum(its[i]) / len(its[i]) if its.get(i) else float("nan") for i in range(last + 1)]
        for its in cells.values()
    ]

    known = [value for _, value in values if value is not None and value == value]
    least = max(0.0, min(0.9, math.floor(10 * min(known, default=0.0)) / 10))
    height = 1.15 + 0.26 * len(cells)
    figure = Figure(figsize=(8.6, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # without pyplot, whose backend is the user's
    axes = figure.subplots()
    figure.subplots_adjust(left=0.24, right=0.98, top=1 - 0.5 / height, bottom=0.45 / height)
    image = axes.imshow(grid, aspect="auto", vmin=least, vmax=1, cmap="Blues", interpolation="none")
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=7)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axes.set_xlabel("layer", fontsize=8.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.035)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
