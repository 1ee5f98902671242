"""Importing is cheap and touches no device; the backend stands alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Whatever asks CUDA for anything goes through one of these.
NO_DEVICE = """
import sys, torch

def refuse(*args, **kwargs):
    raise AssertionError("an import touched the device")

torch.cuda._lazy_init = refuse
for name in ("is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_check_itself_can_fail() -> None:
    with pytest.raises(AssertionError, match="touched the device"):
        run(NO_DEVICE + "torch.cuda._lazy_init()")


def test_backend_alone() -> None:
    run(
        NO_DEVICE + "import filet_kernels\n"
        "found = {'transformers', 'peft', 'filet'} & set(sys.modules)\n"
        "assert not found, found\n"
        "assert all(hasattr(filet_kernels, name) for name in filet_kernels.__all__)"
    )


def test_frontend_touches_no_device() -> None:
    # transformers and peft look for a device while they are imported; filet itself must not.
    run(
        "import sys, torch, transformers, peft\n"
        + NO_DEVICE
        + "import filet, filet.cli.main\n"
        + "assert not torch.cuda.is_initialized()\n"
        + "assert all(hasattr(filet, name) for name in filet.__all__)"
    )
