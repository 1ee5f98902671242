"""What every test file gets: a device to run on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import every_cpu

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

# Files that are read become Arrow here, not in the user's cache; by programs that tests start, too.
# Set before datasets is imported.
_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

every_cpu.alike()

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and where there is one the GPU. float32 means float32 there: no TF32."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tiny tensors: handing them to several costs more than the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports draw nothing: it would take longer than all the rest of a small test."""
    monkeypatch.setattr("filet.FiletReport.plot", lambda report, path: Path(path).touch())
