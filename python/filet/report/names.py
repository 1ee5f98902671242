"""The files of an adapter's folder: their names, and whether the picture can be drawn.

This module imports nothing heavy: the command line needs it before it needs torch.
"""

from __future__ import annotations

import importlib.util

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "FILET_FILE",
    "MARK",
    "PLOT_FILE",
    "REPORT_FILE",
    "WEIGHTS_FILE",
    "can_draw",
]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
"""PEFT's names, as its own saves have them."""

FILET_FILE = "filet.json"
"""Which half of an adapter is frozen, where one is."""

MARK = "filet"
"""In the metadata of weights with a frozen half: their FILET_FILE may get lost, or be another's."""

CARD_FILE = "README.md"
"""The model card, by the name that the Hub shows."""

PLOT_FILE = "energies.png"
"""The picture of the energies."""

REPORT_FILE = "filet_report.safetensors"
"""What :meth:`filet.FiletReport.save` writes."""


def can_draw() -> bool:
    """Whether matplotlib is there, which :meth:`filet.FiletReport.plot` draws with."""
    return importlib.util.find_spec("matplotlib") is not None
