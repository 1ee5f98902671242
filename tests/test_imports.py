"""The rules of the house: which way imports go, what crosses a file, how long things are.

docs/architecture.md says why. The rules are read from the sources. The last tests import: that is
cheap, touches no device, and the backend stands alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"filet": ROOT / "python" / "filet", "filet_kernels": ROOT / "filet_kernels"}

# From the ground up. What stands on a floor imports what stands below, and nothing else.
FLOORS = (
    ("config", "system"),
    ("distributed",),
    ("model", "report"),
    ("loss",),
    ("collect",),
    ("select",),
    ("adapter",),
    ("blockwise",),
    ("initialize",),
    ("data", "trainer"),
    ("cli",),
)
# Below these two stand some that they may not know, whatever the floors allow.
MAY_NOT = {
    "report": {"model", "config"},
    "data": {"loss", "collect", "select", "adapter", "blockwise", "initialize", "report"},
}
# transformers and PEFT are the frontend's; these know neither.
WITHOUT_TRANSFORMERS = ("filet.system", "filet.report", "filet.config", "filet_kernels")

LONGEST_FILE = 600
LONGEST_FUNCTION = 70


def modules(package: str) -> dict[str, Path]:
    """Dotted name → file of every module of a package."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports from, wherever in it, and the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            assert node.module is not None
            names = [alias.name for alias in node.names]
            inner = [name for name in names if f"{node.module}.{name}" in MODULES]
            yield from ((f"{node.module}.{name}", []) for name in inner)
            if len(inner) < len(names):
                yield node.module, [name for name in names if name not in inner]


def ours(name: str) -> list[str]:
    """The modules of ours that a file imports, by their dotted names."""
    return [module for module, _ in imports(MODULES[name]) if module.split(".")[0] in PACKAGES]


def wing(name: str) -> str | None:
    """The folder or file below ``filet`` that a module lies in; None for what is outside."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "filet" and rest else None


def floor(name: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if wing(name) in wings)


INSIDE = [name for name in MODULES if wing(name) is not None]


def test_every_wing_has_a_floor() -> None:
    assert {wing(name) for name in INSIDE} == {each for wings in FLOORS for each in wings}


@pytest.mark.parametrize("name", INSIDE)
def test_imports_go_down(name: str) -> None:
    for other in ours(name):
        # The command line calls what a user of the library calls.
        assert other != "filet" or wing(name) == "cli", f"{name} imports the package's face"
        if wing(other) in (None, wing(name)):
            continue
        assert floor(other) < floor(name), f"{name} imports {other}, which is no floor below"
        assert wing(other) not in MAY_NOT.get(wing(name) or "", ()), f"{name} imports {other}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str) -> None:
    names = modules(package)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in ours(name):
            # The face hands names on; whoever imports a module of a package runs it first.
            if other in names and other != package:
                visit(other, (*path, name))
        done.add(name)

    for name in names:
        if name != package:
            visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_crosses_a_file(name: str) -> None:
    aliases = {}
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in MODULES:
                    aliases[alias.asname or alias.name] = module
                elif alias.name.startswith("_") and not alias.name.startswith("__"):
                    raise AssertionError(f"{name} takes {alias.name} from {node.module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases and node.attr.startswith("_"):
                raise AssertionError(f"{name} takes {node.attr} from {aliases[node.value.id]}")


@pytest.mark.parametrize("name", [n for n in MODULES if wing(n) not in ("cli", "data")])
def test_command_line_and_data_are_leaves(name: str) -> None:
    assert not [other for other in ours(name) if wing(other) in ("cli", "data")]


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(WITHOUT_TRANSFORMERS)]
)
def test_the_ground_knows_no_transformers(name: str) -> None:
    known = {module.partition(".")[0] for module, _ in imports(MODULES[name])}
    assert not known & {"transformers", "peft", "accelerate"}
    if name.startswith("filet_kernels"):
        assert "filet" not in known


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_lives_there(package: str) -> None:
    for folder in {path.parent for path in modules(package).values()} - set(PACKAGES.values()):
        path = folder / "__init__.py"
        tree = ast.parse(path.read_text())
        assert len((ast.get_docstring(tree) or "").splitlines()) >= 3, path
        assert len(tree.body) == 1, f"{path} hands names on"


def test_every_folder_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = set(project["tool"]["setuptools"]["packages"])
    folders = {
        ".".join([package, *path.parent.relative_to(PACKAGES[package]).parts])
        for package in PACKAGES
        for path in modules(package).values()
    }
    assert installed == folders | {"filet_kernels.csrc"}
    for package, folder in PACKAGES.items():
        assert (folder / "py.typed").is_file(), package


SOURCES = sorted(
    path
    for folder in ("python", "filet_kernels", "csrc", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < LONGEST_FILE
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


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
