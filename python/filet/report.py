"""What an initialisation did: per-module energies and choices, as a table, a picture and a file.

:class:`FiletReport` is what :func:`filet.initialize_lora_filet_weights` and
:func:`filet.apply_statistics` return. It is plain data on the CPU, so that it can be printed
(:meth:`FiletReport.table`), drawn (:meth:`FiletReport.plot`), saved beside the adapter
(:meth:`FiletReport.save`) and read back later without the model (:meth:`FiletReport.load`).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filet.files import replaced
from filet.tensorfile import write_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["REPORT_FILE", "FiletReport", "ModuleReport"]

REPORT_FILE = "filet_report.safetensors"
"""Name of the file that :meth:`FiletReport.save` writes into a folder."""

_FORMAT = "filet_report"
_VERSION = "2"
_TABLE_WIDTH = 100


@dataclass(frozen=True, eq=False)
class ModuleReport:
    """The outcome for one linear layer ``y = W x``, ``W`` of shape (m, n) = (out, in).

    Attributes:
        name: module path relative to the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        shape: (m, n) = (out, in) of ``W``.
        rank: number of directions chosen, the LoRA rank of this module.
        energies: (n,) float64, CPU. The Fisher energy of every direction; NaN where the direction
            is not a candidate (its column of ``W`` is zero). Never negative, possibly zero.
        indices: (rank,) int64, CPU. The chosen directions.
        input_space: ``"x"`` or ``"y"``, where the second moment of the input side was taken.
        output_space: ``"g"`` or ``"h"``, where the second moment of the output side was taken.
        input_tokens: positions counted in the input side's moment.
        output_tokens: positions counted in the output side's moment.
        shared_input: module whose input second moment this one shares, or None.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energies: torch.Tensor
    indices: torch.Tensor
    input_space: str
    output_space: str
    input_tokens: int
    output_tokens: int
    shared_input: str | None

    def chosen(self) -> torch.Tensor:
        """Energies of the chosen directions, (rank,) float64, in the order of ``indices``."""
        return self.energies[self.indices]

    def candidates(self) -> torch.Tensor:
        """Energies of every candidate direction (finite ones), (<= n,) float64."""
        return self.energies[torch.isfinite(self.energies)]


@dataclass(frozen=True, eq=False)
class FiletReport:
    """The outcome for a whole model. Every mapping is in the model's order.

    Attributes:
        modules: module name -> what was chosen for it.
        left_default: module name -> why it kept PEFT's default LoRA initialisation.
        seconds: phase -> seconds of wall-clock time.
        peak_memory: bytes; on CUDA the peak allocated, on a CPU the peak resident set.
        samples: samples that went through the model.
        tokens: positions counted, padding excluded.
        loss_terms: labels that entered the loss.
        config: the :class:`filet.FiletConfig` as a JSON-able dict.
    """

    modules: dict[str, ModuleReport]
    left_default: dict[str, str]
    seconds: dict[str, float]
    peak_memory: int
    samples: int
    tokens: int
    loss_terms: int
    config: dict[str, Any]

    # -- text ------------------------------------------------------------------------------------

    def table(self) -> str:
        """A table for a terminal: one row a module, then summary lines.

        Plain ASCII, at most 100 columns wide; names that do not fit lose their common prefix
        first and then as much of their beginning as is needed.
        """
        lines: list[str] = []
        if self.modules:
            lines += [*self._rows(), ""]
        lines += self._summary()
        return "\n".join(lines)

    def _rows(self) -> list[str]:
        header = ("out x in", "rank", "moments", "chosen", "to", "median", "tokens")
        cells: list[tuple[str, ...]] = []
        for module in self.modules.values():
            low, high = _extent(module.chosen())
            candidates = module.candidates()
            median = float(candidates.median()) if candidates.numel() else float("nan")
            tokens = _count(module.input_tokens)
            if module.output_tokens != module.input_tokens:
                tokens += "/" + _count(module.output_tokens)
            shared = "*" if module.shared_input else " "
            cells.append(
                (
                    f"{module.shape[0]} x {module.shape[1]}",
                    str(module.rank),
                    f"{module.input_space}{shared} {module.output_space}",
                    _scientific(low),
                    _scientific(high),
                    _scientific(median),
                    tokens,
                )
            )
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
        room = _TABLE_WIDTH - sum(widths) - 2 * len(widths)
        title, names = _fit_names(list(self.modules), room)
        name_width = max(len(title), *(len(name) for name in names))

        def line(name: str, row: tuple[str, ...]) -> str:
            columns = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            return "  ".join([name.ljust(name_width), *columns])

        rule = "-" * len(line("", header))
        rows = [line(name, row) for name, row in zip(names, cells, strict=True)]
        return [line(title, header), rule, *rows, rule]

    def _summary(self) -> list[str]:
        modules = list(self.modules.values())
        lines: list[str] = []

        def add(label: str, text: str) -> None:
            lines.extend(_wrap(label, text))

        if modules:
            ranks = sorted({module.rank for module in modules})
            rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
            parameters = sum(module.rank * sum(module.shape) for module in modules)
            text = f"{_plural(len(modules), 'module')}, {rank}, {parameters:,} LoRA parameters"
            shared = sum(module.shared_input is not None for module in modules)
            if shared:
                text += f"; * {shared} share an earlier module's input moment"
            add("initialised", text)
        else:
            add("initialised", "no module")
        add(
            "data",
            f"{_plural(self.samples, 'sample')}, {_plural(self.tokens, 'token')}, "
            f"{_plural(self.loss_terms, 'loss term')}",
        )
        if self.config:
            add("config", ", ".join(f"{key}={value}" for key, value in self.config.items()))
        if modules:
            excluded = [int(torch.isnan(module.energies).sum()) for module in modules]
            if any(excluded):
                count = sum(1 for number in excluded if number)
                add(
                    "excluded",
                    f"{_plural(sum(excluded), 'zero column')} of W in {_plural(count, 'module')}",
                )
        if self.seconds:
            phases = ", ".join(f"{name} {_seconds(time)}" for name, time in self.seconds.items())
            total = _seconds(sum(self.seconds.values()))
            add("time", f"{total} ({phases})" if len(self.seconds) > 1 else phases)
        if self.peak_memory:
            add("peak memory", _bytes(self.peak_memory))
        reasons: dict[str, list[str]] = {}  # alike reasons on one line
        for name, reason in self.left_default.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            add("left default", f"{_plural(len(names), 'module')}: {shown}: {reason}")
        return lines

    # -- picture ---------------------------------------------------------------------------------

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the energies of every layer as a PNG file, the chosen directions marked.

        One panel a kind of module (``q_proj``, ``down_proj``, ...), the layer to the right and
        the energy upwards on a log scale: bands for all directions, the middle 90 % and the middle
        half of them, the median, and a mark for every chosen direction. Zero energies are drawn
        on a line below the smallest positive one.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the report holds no module.
            OSError: the file cannot be written; an existing one is left as it was.
        """
        if not self.modules:
            raise ValueError("the report holds no initialised module: there is nothing to draw")
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.lines import Line2D
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError(
                "drawing the energies needs matplotlib: pip install 'filet-kernels[frontend]'"
            ) from error

        panels = _panels(list(self.modules.values()))
        floor, bottom, top, has_zero = _log_range(list(self.modules.values()))
        count = len(panels)
        columns = min(count, 4)
        rows = -(-count // columns)
        width = max(6.4, 3.3 * columns + 0.5)
        wide = width > 8  # room for the legend beside the title
        header = 0.98 if wide else 1.24
        height = 2.5 * rows + 0.37 + header
        figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.68 / width,
            right=1 - 0.2 / width,
            top=1 - header / height,
            bottom=0.55 / height,
            wspace=0.06,
            hspace=0.34 if rows > 1 else 0.2,
        )
        for index, axes in enumerate(grid.flat):
            if index >= count:
                axes.set_visible(False)
                continue
            _draw_panel(axes, panels[index], floor)
            axes.set_ylim(bottom, top)
            if index + columns >= count:
                axes.set_xlabel(panels[index].x_label, fontsize=8.5, color=_INK)
        _label_decades(grid[0][0], bottom, top, floor if has_zero else None)
        for axes in grid[:, 0]:
            axes.set_ylabel("Fisher energy", fontsize=8.5, color=_INK)

        ranks = sorted({module.rank for module in self.modules.values()})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        which = {"min": "lowest energies", "max": "highest energies", "random": "random choice"}
        choice = which.get(str(self.config.get("select", "")), "chosen directions")
        left = 0.68 / width
        figure.text(
            left,
            1 - 0.2 / height,
            "FILet: sensitivity of the loss to each direction",
            fontsize=12.5,
            fontweight="bold",
            color=_INK,
            va="top",
        )
        subtitle = f"{_plural(len(self.modules), 'module')}, rank {rank}, {choice}"
        if self.samples:
            subtitle += f", {_plural(self.samples, 'sample')}, {_plural(self.tokens, 'token')}"
        figure.text(left, 1 - 0.46 / height, subtitle, fontsize=8.5, color=_MUTED, va="top")
        handles = [
            Line2D([], [], color=_CHOSEN, lw=1.6, label="chosen"),
            Line2D([], [], color=_MEDIAN, lw=1.6, label="median"),
            Patch(facecolor=_INNER, label="25-75 %"),
            Patch(facecolor=_OUTER, label="5-95 %"),
            Patch(facecolor=_WHOLE, label="all directions"),
        ]
        figure.legend(
            handles=handles,
            loc="upper right" if wide else "upper left",
            bbox_to_anchor=(
                (1 - 0.14 / width, 1 - 0.16 / height) if wide else (left, 1 - 0.68 / height)
            ),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
            handlelength=1.4,
            columnspacing=1.4,
            borderaxespad=0.0,
            borderpad=0.2,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        with replaced(path) as beside:
            beside.write_bytes(buffer.getvalue())

    # -- file ------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``filet_report.safetensors`` into ``folder`` and return its path.

        The energies and indices are the tensors ``<module>.energies`` and ``<module>.indices``;
        the rest is JSON under ``report`` in the metadata.

        Raises:
            OSError: the file cannot be written; an existing one is left as it was.
        """
        tensors: dict[str, torch.Tensor] = {}
        described: list[dict[str, Any]] = []
        for name, module in self.modules.items():
            tensors[f"{name}.energies"] = module.energies
            tensors[f"{name}.indices"] = module.indices
            described.append(
                {"key": name}
                | {
                    field.name: getattr(module, field.name)
                    for field in fields(module)
                    if field.name not in ("energies", "indices")
                }
            )
        content = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "modules"
        }
        content["modules"] = described
        metadata = {"format": _FORMAT, "version": _VERSION, "report": json.dumps(content)}
        path = Path(folder) / REPORT_FILE
        write_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, folder_or_file: str | os.PathLike[str]) -> FiletReport:
        """Read a report that :meth:`save` wrote, from its folder or from the file itself.

        Raises:
            FileNotFoundError: there is no such file, or no report in the folder.
            ValueError: the file is not a filet report, or of a version this package cannot read.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder_or_file)
        if path.is_dir():
            path = path / REPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no filet report at {path}")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"{path} is not a filet report: its metadata says "
                        f"format={metadata.get('format')!r}, expected {_FORMAT!r}"
                    )
                if metadata.get("version") != _VERSION:
                    raise ValueError(
                        f"{path} is a filet report of version {metadata.get('version')!r}; "
                        f"this package reads version {_VERSION!r}"
                    )
                content = json.loads(metadata["report"])
                modules: dict[str, ModuleReport] = {}
                for described in content.pop("modules"):
                    key = described.pop("key")
                    described["shape"] = tuple(described["shape"])
                    modules[key] = ModuleReport(
                        energies=file.get_tensor(f"{key}.energies"),
                        indices=file.get_tensor(f"{key}.indices"),
                        **described,
                    )
            return cls(modules=modules, **content)
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable filet report: {error}") from error


# -- helpers: text ---------------------------------------------------------------------------------


def _extent(values: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest of ``values``, NaN for none."""
    if values.numel() == 0:
        return float("nan"), float("nan")
    return float(values.min()), float(values.max())


def _scientific(value: float) -> str:
    """``1.2e-9``: two digits, no padding of the exponent; ``0`` and ``-`` (NaN) as such."""
    if value != value:
        return "-"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _count(number: int) -> str:
    """``81,234``; from a hundred thousand on three digits and a unit, ``1.23M``."""
    if number < 100_000:
        return f"{number:,}"
    for unit, size in (("k", 10**3), ("M", 10**6)):
        if number < 999.5 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number / 10**9:.4g}G"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _bytes(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _wrap(label: str, text: str) -> list[str]:
    """``label  text`` with the text wrapped to the table's width under itself."""
    import textwrap

    indent = 14
    wrapped = textwrap.wrap(
        text, _TABLE_WIDTH - indent, break_on_hyphens=False, break_long_words=True
    )
    return [
        (label if row == 0 else "").ljust(indent) + line for row, line in enumerate(wrapped or [""])
    ]


def _fit_names(names: Sequence[str], room: int) -> tuple[str, list[str]]:
    """The column's title and the names, shortened to ``room`` characters."""
    title = "module"
    if max(len(name) for name in names) > room and len(names) > 1:
        split = [name.split(".") for name in names]
        shared = 0
        shortest = min(len(parts) for parts in split)
        while shared < shortest - 1 and len({parts[shared] for parts in split}) == 1:
            shared += 1
        if shared:
            title = f"module in {'.'.join(split[0][:shared])}"
            names = [".".join(parts[shared:]) for parts in split]
    return _elide(title, room), [_elide(name, room) for name in names]


def _elide(name: str, room: int) -> str:
    """``name``, its beginning replaced by ``...`` where it is longer than ``room``.

    The tail is what tells modules apart: the layer's number and the projection.
    """
    if len(name) <= room:
        return name
    return "..." + name[-max(room - 3, 1) :]


# -- helpers: picture ------------------------------------------------------------------------------

_INK = "#1f2933"
_MUTED = "#616e7c"
_GRID = "#e4e7eb"
_WHOLE = "#e6edf5"
_OUTER = "#c2d4e8"
_INNER = "#8aadd3"
_MEDIAN = "#1d4e89"
_CHOSEN = "#e8590c"


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
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
    if not numbers:
        return None, ()
    first = numbers[0]
    rest = tuple("*" if part.isdigit() else part for part in parts[first + 1 :])
    return int(parts[first]), (*parts[:first], "*", *rest)


def _panels(modules: Sequence[ModuleReport]) -> list[_Panel]:
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
        titles.append(_elide(".".join(kind[-length:]), 34))
    return titles


def _log_range(modules: Sequence[ModuleReport]) -> tuple[float, float, float, bool]:
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


def _draw_panel(axes: Axes, panel: _Panel, floor: float) -> None:
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
    axes.hlines(
        marks_y,
        [position - 0.32 * width for position in marks_x],
        [position + 0.32 * width for position in marks_x],
        colors=_CHOSEN,
        linewidths=0.7,
        alpha=0.9,
        zorder=3,
    )
    axes.set_title(panel.title, loc="left", fontsize=9.5, color=_INK, pad=5)
    axes.set_xlim(min(x) - 0.7, max(x) + 0.7)
    if len(x) == 1:
        axes.set_xlim(x[0] - 2, x[0] + 2)
    if panel.names is not None and len(x) <= 8:
        axes.set_xticks(x, [_elide(name, 12) for name in panel.names])
    elif len(x) <= 8:
        axes.set_xticks(x, [str(position) for position in x])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _label_decades(axes: Axes, bottom: float, top: float, zero: float | None) -> None:
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
