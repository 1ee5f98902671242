"""The pages: where their links lead, and whether the files and commands they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def anchors(page: Path) -> set[str]:
    """Of its headings, as they are linked to: lower case, words with hyphens between them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), link
        assert not anchor or anchor in anchors(goal), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    top = r"`((?:python|filet_kernels|csrc|tests|benchmarks|examples)/[\w./]+\.\w+)`"
    for name in re.findall(top, page.read_text()):
        assert (ROOT / name).exists(), name
    folders = "|".join(path.name for path in (ROOT / "python" / "filet").iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{folders})/\w+\.py)`", page.read_text()):
        assert (ROOT / "python" / "filet" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_in_the_makefile(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:`|^    )make ([a-z][a-z -]*)", page.read_text(), re.MULTILINE):
        for command in line.split():
            assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
