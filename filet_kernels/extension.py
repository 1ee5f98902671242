"""The compiled CUDA extension (csrc/): built with the package, or else compiled on first use.

Only a call on CUDA tensors asks for it, so that neither an import nor a machine without a GPU
compiles anything. ``FILET_BUILD_CUDA=0`` forbids compiling, ``FILET_CACHE`` says where the result
goes (by default ~/.cache/filet_kernels). The logger ``filet_kernels`` tells, at level INFO, that it
is compiled, which takes up to a minute.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from filet_kernels import build

__all__ = ["cuda_extension", "extension_on", "stream_of", "why_no_extension"]

_NAME = "filet_kernels._cuda"
_LINES = 30  # of a compiler's output that a message repeats, the last ones


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none. Tried once in a process."""
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        reason = f"the CUDA extension is not built ({error})"
    if os.environ.get("FILET_BUILD_CUDA") == "0":
        return None, f"{reason}, and FILET_BUILD_CUDA=0 forbids compiling it"
    lacking = _no_gpu() or build.missing(build.SOURCES)
    if lacking is not None:
        return None, f"{reason}, nor can it be compiled: {lacking}"
    try:
        return _compiled(build.SOURCES), None
    except (ImportError, OSError, RuntimeError) as error:
        output = "\n".join(str(error).rstrip().splitlines()[-_LINES:])
        reason = f"{reason}, and compiling it failed:\n{output}"
        warnings.warn(f"{reason}\nOther backends take its place.", stacklevel=2)
        return None, reason


def _no_gpu() -> str | None:
    """Why no GPU here could run what nvcc would compile, or None."""
    devices = range(torch.cuda.device_count() if torch.version.cuda else 0)
    if not any(torch.cuda.get_device_capability(device) >= (8, 0) for device in devices):
        return "there is no GPU of compute capability 8.0 or later"
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    driver, nvcc = version.value // 1000, build.find_nvcc()
    if nvcc is not None and nvcc.major > driver:
        return f"{nvcc.path} is of CUDA {nvcc.major}; expected {driver}, the driver's, or earlier"
    return None


def _compiled(sources: Path) -> ModuleType:
    path = build.cached(sources)
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream_of(device: torch.device) -> int:
    """The address of a device's current stream; torch.cuda.current_stream takes 20 µs to say it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    address: int = torch._C._cuda_getCurrentRawStream(index)
    return address


def why_no_extension() -> str | None:
    """Why the extension cannot be used, or None where it can. The first call may compile it."""
    return _load()[1]


def cuda_extension() -> ModuleType:
    """The extension; only where :func:`why_no_extension` is None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def _runs_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in {(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)}


def extension_on(device: torch.device) -> ModuleType | None:
    """The extension where it is there and has machine code for this device, else None."""
    if device.type != "cuda" or not _runs_on(device) or why_no_extension() is not None:
        return None
    return cuda_extension()
