"""Whether the tests can run Triton's kernels: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest
import torch


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    found = version("triton")
    if torch.cuda.is_available() or tuple(map(int, found.split(".")[:2])) >= (3, 7):
        return None
    # 3.4 to 3.6 fail on NumPy 2.4; 3.4 and 3.5 also ask strides in elements to be multiples of 16.
    return f"Triton {found} is installed; in the interpreter the tests need 3.7 or later"


def skip_interpreter(device: torch.device) -> None:
    """Where there is a GPU, Triton's kernels run there, and not in the interpreter."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("it needs a CUDA device")


NO_TRITON = _why_not()
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
