"""with_gptqmodel.py, where the library that it needs is beside the environment, and not in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from beside import finding

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "gptqmodel"


@pytest.mark.skipif(
    not (FOLDER / "gptqmodel").is_dir(),
    reason="no gptqmodel in build/; make test puts it there, with a C compiler",
)
def test_with_gptqmodel() -> None:
    """In a process of its own: imported, the library changes what others see.

    Without its torch.compile of every layer, which takes half of the time.
    """
    environment = {**finding(FOLDER), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-r", "fE", "--tb=short",
         str(HERE / "with_gptqmodel.py")],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"23 passed", done.stdout), done.stdout[-2000:]
