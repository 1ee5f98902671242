"""Packages that lie beside the environment, in build/, for processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["finding"]


def finding(*folders: Path) -> dict[str, str]:
    """The environment with which a Python finds what is in these folders before its own."""
    paths = map(str, filter(None, [*folders, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
