"""The compiled CUDA extension (csrc/), loaded on first use."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

__all__ = ["cuda_extension", "why_no_extension"]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("filet_kernels._cuda"), None
    except ImportError as error:
        return None, (
            f"the CUDA extension is not built ({error}); install with nvcc on PATH and "
            "FILET_BUILD_CUDA=1 to demand it"
        )


def why_no_extension() -> str | None:
    """Why the extension cannot be used, or None where it can."""
    return _load()[1]


def cuda_extension() -> ModuleType:
    """The extension; only where :func:`why_no_extension` is None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module
