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
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from filet.report.modules import ModuleReport
from filet.report.plot import (
    CHOSEN,
    INK,
    INNER,
    MEDIAN,
    MUTED,
    OUTER,
    WHOLE,
    draw_panel,
    label_decades,
    log_range,
    panels_of,
)
from filet.system.files import replaced
from filet.system.tensorfile import write_tensors
from filet.system.text import elide, plural, readable

__all__ = ["REPORT_FILE", "FiletReport", "ModuleReport", "elide", "plural"]

REPORT_FILE = "filet_report.safetensors"
"""Name of the file that :meth:`FiletReport.save` writes into a folder."""


_FORMAT = "filet_report"


_VERSION = "2"


_TABLE_WIDTH = 100


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
            text = f"{plural(len(modules), 'module')}, {rank}, {parameters:,} LoRA parameters"
            shared = sum(module.shared_input is not None for module in modules)
            if shared:
                text += f"; * {shared} share an earlier module's input moment"
            add("initialised", text)
        else:
            add("initialised", "no module")
        add(
            "data",
            f"{plural(self.samples, 'sample')}, {plural(self.tokens, 'token')}, "
            f"{plural(self.loss_terms, 'loss term')}",
        )
        if self.config:
            add("config", ", ".join(f"{key}={value}" for key, value in self.config.items()))
        if modules:
            excluded = [int(torch.isnan(module.energies).sum()) for module in modules]
            if any(excluded):
                count = sum(1 for number in excluded if number)
                add(
                    "excluded",
                    f"{plural(sum(excluded), 'zero column')} of W in {plural(count, 'module')}",
                )
        if self.seconds:
            phases = ", ".join(f"{name} {_seconds(time)}" for name, time in self.seconds.items())
            total = _seconds(sum(self.seconds.values()))
            add("time", f"{total} ({phases})" if len(self.seconds) > 1 else phases)
        if self.peak_memory:
            add("peak memory", readable(self.peak_memory))
        reasons: dict[str, list[str]] = {}  # alike reasons on one line
        for name, reason in self.left_default.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            add("left default", f"{plural(len(names), 'module')}: {shown}: {reason}")
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

        panels = panels_of(list(self.modules.values()))
        floor, bottom, top, has_zero = log_range(list(self.modules.values()))
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
            draw_panel(axes, panels[index], floor)
            axes.set_ylim(bottom, top)
            if index + columns >= count:
                axes.set_xlabel(panels[index].x_label, fontsize=8.5, color=INK)
        label_decades(grid[0][0], bottom, top, floor if has_zero else None)
        for axes in grid[:, 0]:
            axes.set_ylabel("Fisher energy", fontsize=8.5, color=INK)

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
            color=INK,
            va="top",
        )
        subtitle = f"{plural(len(self.modules), 'module')}, rank {rank}, {choice}"
        if self.samples:
            subtitle += f", {plural(self.samples, 'sample')}, {plural(self.tokens, 'token')}"
        figure.text(left, 1 - 0.46 / height, subtitle, fontsize=8.5, color=MUTED, va="top")
        handles = [
            Line2D([], [], color=CHOSEN, lw=1.6, label="chosen"),
            Line2D([], [], color=MEDIAN, lw=1.6, label="median"),
            Patch(facecolor=INNER, label="25-75 %"),
            Patch(facecolor=OUTER, label="5-95 %"),
            Patch(facecolor=WHOLE, label="all directions"),
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
            labelcolor=INK,
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


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


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
    return elide(title, room), [elide(name, room) for name in names]
