"""Names of the files that a report leaves in an adapter's folder.

This module imports nothing: the command line names the files before it needs torch.
"""

from __future__ import annotations

__all__ = ["PLOT_FILE", "REPORT_FILE"]

PLOT_FILE = "energies.png"
"""The picture of the energies."""

REPORT_FILE = "filet_report.safetensors"
"""What :meth:`filet.FiletReport.save` writes."""
