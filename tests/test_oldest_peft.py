"""A part of the tests with the oldest PEFT of pyproject.toml: where its versions differ."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import oldest_peft

# By what they are about; each in a process of its own. About a minute of one core's each.
PARTS = {
    "passes": [
        "tests/test_head.py", "tests/test_pass.py", "tests/test_vlm_pass.py",
        "tests/quantised/test_quantised_head.py", "tests/test_isolation.py",
        "tests/cli/test_cli_tasks.py",
        "-k", "not compiled and not smollm2 and not other_reasons",
    ],
    "adapters": [
        "tests/test_start.py", "tests/test_saved.py", "tests/test_peft.py",
        "tests/test_recipes.py", "tests/test_meets_peft.py",
        "-k", "not (each_start or exception or meets_peft) or (kept_or_refused and Llama)",
    ],
}  # fmt: skip


@pytest.fixture
def it_is_there() -> None:
    if not oldest_peft.is_there():
        pytest.skip(f"{oldest_peft.requirement()} is not in build/; make test puts it there")


def output(*arguments: str) -> str:
    done = oldest_peft.run(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return str(done.stdout)


@pytest.mark.usefixtures("it_is_there")
@pytest.mark.parametrize("part", PARTS)
def test_part(part: str) -> None:
    quiet = ["-q", "-p", "no:cacheprovider", "-r", "fE", "--tb=short"]
    found = output("-m", "pytest", *quiet, *PARTS[part])
    assert re.search(r"\d+ passed", found.splitlines()[-1]), found


@pytest.mark.usefixtures("it_is_there")
def test_it_is_the_one_that_is_found() -> None:
    found = output(
        "-c",
        "import importlib.metadata as m, importlib.util as u;"
        "print(m.version('peft'), u.find_spec('peft').origin, u.find_spec('torchao'))",
    )
    version, origin, torchao = found.split()
    assert version in oldest_peft.requirement().specifier
    assert Path(origin) == oldest_peft.FOLDER / "peft" / "__init__.py"
    assert torchao == "None"


def test_the_docs_name_it() -> None:
    docs = oldest_peft.ROOT / "docs"
    (named,) = re.findall(
        r"PEFT (\S+), the oldest that is supported", (docs / "adapters.md").read_text()
    )
    (bound,) = re.findall(r"and PEFT ≥ (\S+)\. ", (docs / "recipes.md").read_text())
    assert all(version in oldest_peft.requirement().specifier for version in (named, bound))
