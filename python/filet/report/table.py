"""An initialisation as text for a terminal: a row a module, then what holds for all of them.

Plain ASCII, at most 100 columns wide.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from filet.report.modules import ModuleReport
from filet.system.text import elide, plural, readable

__all__ = [
    "HEADER",
    "cells",
    "count",
    "entries_of",
    "hash_text",
    "kept_text",
    "lines_of",
    "rows",
    "scientific",
    "summary",
]

_WIDTH = 100

_INDENT = 14  # of what is said below a label

HEADER = ("out x in", "rank", "moments", "chosen", "to", "median", "tokens")


def rows(modules: Mapping[str, ModuleReport]) -> list[str]:
    """The header and a line for each module, at least one, between rules."""
    return lines_of(HEADER, list(modules), [cells(module) for module in modules.values()])


def lines_of(
    header: Sequence[str], modules: Sequence[str], cells: Sequence[Sequence[str]]
) -> list[str]:
    """A table as lines: the header, and a module's name and cells in each, between rules.

    Names that do not fit lose their common prefix first and then as much of their beginning as is
    needed.
    """
    widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
    room = _WIDTH - sum(widths) - 2 * len(widths)
    title, names = _fit_names(modules, room)
    name_width = max(len(title), *(len(name) for name in names))

    def line(name: str, row: Sequence[str]) -> str:
        columns = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([name.ljust(name_width), *columns])

    rule = "-" * len(line("", header))
    body = [line(name, row) for name, row in zip(names, cells, strict=True)]
    return [line(title, header), rule, *body, rule]


def entries_of(
    modules: Sequence[ModuleReport],
    *,
    samples: int,
    tokens: int,
    loss_terms: int,
    data: int,
    keep: Mapping[str, Any],
    config: Mapping[str, Any],
    seconds: Mapping[str, float],
    peak_memory: int,
    left_default: Mapping[str, str],
) -> list[tuple[str, str]]:
    """What is said of the whole model, each with its label."""
    seen = [plural(samples, "sample"), plural(tokens, "token"), plural(loss_terms, "loss term")]
    seen += [f"hash {hash_text(data)}"] if data else []
    entries = [("initialised", _initialised(modules)), ("data", ", ".join(seen))]
    if keep:
        entries.append(("data to keep", kept_text(keep)))
    if config:
        entries.append(("config", ", ".join(f"{k}={_plain(v)}" for k, v in config.items())))
    excluded = [number for module in modules if (number := int(module.energies.isnan().sum()))]
    if any(module.kind == "contrast" for module in modules):
        entries.append(("chosen", "eigenvalues of task against data to keep (select='contrast')"))
    if excluded:
        columns, where = plural(sum(excluded), "zero column"), plural(len(excluded), "module")
        entries.append(("excluded", f"{columns} of W in {where}"))
    if seconds:
        phases = ", ".join(f"{name} {_duration(time)}" for name, time in seconds.items())
        total = _duration(sum(seconds.values()))
        entries.append(("time", f"{total} ({phases})" if len(seconds) > 1 else phases))
    if peak_memory:
        entries.append(("peak memory", readable(peak_memory)))
    entries += [("left default", text) for text in _by_reason(left_default)]
    return entries


def kept_text(keep: Mapping[str, Any]) -> str:
    """How much data to keep there was, and where it came from, where that is known."""
    counts = [plural(keep["samples"], "sample"), plural(keep["tokens"], "token")]
    return ", ".join(counts) + (f", from {keep['from']}" if keep["from"] else "")


def hash_text(data: int) -> str:
    """The hash of the data: 96 bits, of a sum of as many for each sample."""
    return f"{data % 2**96:024x}"


def summary(entries: Sequence[tuple[str, str]]) -> list[str]:
    """The lines below the rows: labels, and what is said of each, wrapped."""
    return [line for label, text in entries for line in _wrap(label, text)]


def count(number: int) -> str:
    """``81,234``; from a hundred thousand on three digits and a unit, ``1.23M``."""
    if number < 100_000:
        return f"{number:,}"
    for unit, size in (("k", 10**3), ("M", 10**6)):
        if number < 999.5 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number / 10**9:.4g}G"


def cells(module: ModuleReport) -> tuple[str, ...]:
    """What a module has in the columns of :data:`HEADER`."""
    low, high = _extent(module.chosen())
    candidates = module.candidates()
    # By contrast there are no others than those that were chosen.
    others = candidates.numel() and module.kind == "energy"
    median = float(candidates.median()) if others else float("nan")
    tokens = count(module.input_tokens)
    if module.output_tokens != module.input_tokens:
        tokens += "/" + count(module.output_tokens)
    shared = "*" if module.shared_input else " "
    return (
        f"{module.shape[0]} x {module.shape[1]}",
        str(module.rank),
        f"{module.input_space}{shared} {module.output_space}",
        scientific(low),
        scientific(high),
        scientific(median),
        tokens,
    )


def _initialised(modules: Sequence[ModuleReport]) -> str:
    if not modules:
        return "no module"
    ranks = sorted({module.rank for module in modules})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    parameters = sum(module.rank * sum(module.shape) for module in modules)
    text = f"{plural(len(modules), 'module')}, {rank}, {parameters:,} LoRA parameters"
    shared = sum(module.shared_input is not None for module in modules)
    return f"{text}; * {shared} share an earlier module's input moment" if shared else text


def _by_reason(left_default: Mapping[str, str]) -> list[str]:
    """Modules that kept PEFT's initialisation, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_default.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        lines.append(f"{plural(len(names), 'module')}: {shown}: {reason}")
    return lines


def _extent(values: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest of ``values``, NaN for none."""
    if values.numel() == 0:
        return float("nan"), float("nan")
    return float(values.min()), float(values.max())


def _plain(value: Any) -> str:
    """A setting: a third with four digits of it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scientific(value: float) -> str:
    """``1.2e-9``: two digits, no padding of the exponent; ``0`` and ``-`` (NaN) as such."""
    if value != value:
        return "-"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


def _wrap(label: str, text: str) -> list[str]:
    """``label  text`` with the text wrapped to the table's width under itself."""
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False, break_long_words=True)
    return [
        (label if row == 0 else "").ljust(_INDENT) + line
        for row, line in enumerate(wrapped or [""])
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
