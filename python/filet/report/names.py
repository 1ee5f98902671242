"""The files that a report leaves in an adapter's folder: their names, and whether one can be drawn.

This module imports nothing heavy: the command line needs it before it needs torch.
"""

from __future__ import annotations

import importlib.util

__all__ = ["PLOT_FILE", "REPORT_FILE", "can_draw"]

PLOT_FILE = "energies.png"
"""The picture of the energies."""

REPORT_FILE = "filet_report.safetensors"
"""What :meth:`filet.FiletReport.save` writes."""


def can_draw() -> bool:
    """Whether matplotlib is there, which :meth:`filet.FiletReport.plot` draws with."""
    return importlib.util.find_spec("matplotlib") is not None
