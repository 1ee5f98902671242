"""Tests with the oldest PEFT that pyproject.toml allows: ``python tests/oldest_peft.py FILE...``.

`make test` puts it into build/, beside the environment, which has the newest. A part of the tests
runs with it there (test_oldest_peft.py); all but tests/effect, which compares with starts that only
newer ones have, may be run by hand.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from beside import finding

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = ROOT / "build" / "oldest-peft"


def requirement() -> Requirement:
    """The lowest version that pyproject.toml allows, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (x for x in project["optional-dependencies"]["frontend"] if x.startswith("peft>="))
    return Requirement(bound.replace(">=", "=="))


def is_there() -> bool:
    found = importlib.metadata.distributions(name="peft", path=[str(FOLDER)])
    return [d.version for d in found if d.version in requirement().specifier] != []


def older_than(version: str) -> bool:
    """Whether the PEFT that this process imports is."""
    return Version(importlib.metadata.version("peft")) < Version(version)


def needs(version: str, why: str) -> None:
    """Skip a test where PEFT is older."""
    if older_than(version):
        pytest.skip(f"PEFT before {version} {why}")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python that finds that PEFT before the environment's, and no torchao."""
    environment = finding(HERE / "without_torchao", FOLDER)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **options
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--requirement"]:
        print(requirement())
    else:
        raise SystemExit(run("-m", "pytest", *sys.argv[1:]).returncode)
