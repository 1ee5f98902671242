"""PEFT's own tests with FILet after every ``get_peft_model``: `make test-peft`.

The tests are those of the installed PEFT's source distribution, fetched by pip and run from build/.
A test that passes without FILet and fails with it has to stand in tests/peft_suite.txt, under the
reason why that is right; whatever else differs, in either direction, is an error. Tests that need
the hub are skipped. ``--part`` runs one of every so many, for `make test`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from beside import finding

HERE = Path(__file__).resolve().parent
LIST = HERE / "peft_suite.txt"
# Of every method of PEFT's; LoRA's by what their names say.
OF_ALL = ("test_custom_models.py", "test_tuners_utils.py", "test_mixed.py")
LORA = "lora and not AdaLora and not VeraLora and not VBLora and not XLora and not RandLora"
FILES = (
    "test_initialization.py", "test_target_parameters.py", "test_other.py", "test_low_level_api.py",
    "test_trainable_tokens.py", "test_lora_conversion.py", "test_lora_intruders.py",
    "test_lora_variants.py", "test_lorafa.py", "test_loraplus.py", "test_bdlora.py",
    "test_velora.py", "test_arrow.py",
)  # fmt: skip
PART = 20  # one test of so many


def folder() -> Path:
    return HERE.parent / "build" / f"peft-{importlib.metadata.version('peft')}"


def is_there() -> bool:
    return (folder() / "tests" / "__init__.py").is_file()


def fetch() -> Path:
    """PEFT's tests, as a package "tests" in a folder of their own; fetched where not there."""
    place = folder()
    if not is_there():
        version = importlib.metadata.version("peft")
        with tempfile.TemporaryDirectory() as downloaded:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                 ":all:", "--dest", downloaded, f"peft=={version}"],
                check=True,
            )  # fmt: skip
            (archive,) = Path(downloaded).glob("peft-*.tar.gz")
            with tarfile.open(archive) as tar:
                root = archive.name.removesuffix(".tar.gz")
                members = [m for m in tar if m.name.startswith(f"{root}/tests/")]
                for member in members:
                    member.name = member.name.removeprefix(f"{root}/")
                tar.extractall(place, members, filter="data")
        (place / "tests" / "__init__.py").touch()
    return place


def run(place: Path, arguments: Sequence[str]) -> dict[str, bool]:
    """Test → whether it passed; without those that were skipped."""
    # No test may ask the hub, and none of ours ends up in a file of PEFT's.
    environment = finding(HERE, HERE.parent / "benchmarks", place)
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as results:
        file = Path(results) / "results.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(place),
             "-p", "no:cacheprovider", "-p", "filet_in_peft", "-W", "ignore", "--tb=no",
             f"--junitxml={file}", *arguments],
            cwd=place, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}")
        found = {}
        for case in ET.parse(file).iter("testcase"):
            if case.find("skipped") is None:
                *module, name = *case.attrib["classname"].split("."), case.attrib["name"]
                place_of = "/".join(module[:2]) + ".py"  # tests/test_x.py, and a class in it
                node = "::".join([place_of, *module[2:], name])
                found[node] = case.find("failure") is None and case.find("error") is None
    return found


def reasons() -> dict[str, str]:
    """Pattern of tests → why they may differ."""
    found, why = {}, ""
    for line in LIST.read_text().splitlines():
        if line.startswith("#"):
            why = line.removeprefix("#").strip()
        elif line.strip():
            found[line.strip()] = why
    return found


def matches(node: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(node, pattern.replace("[", "[[]"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="store_true", help=f"one test of {PART}")
    parser.add_argument("--fetch", action="store_true", help="get PEFT's tests, run none")
    args = parser.parse_args(argv)
    place = fetch()
    if args.fetch:
        return 0
    every = ["--every", str(PART if args.part else 1)]
    with_filet: dict[str, bool] = {}
    for names, chosen in ((FILES, []), (OF_ALL, ["-k", LORA])):
        tests = [f"tests/{name}" for name in names]
        with_filet |= run(place, ["--with-filet", *every, *chosen, *tests])
    failed = [node for node, passed in with_filet.items() if not passed]
    without = run(place, failed) if failed else {}
    differ = [node for node in failed if without.get(node, False)]
    patterns = reasons()
    new = [node for node in differ if not any(matches(node, p) for p in patterns)]
    stale = [p for p in patterns if not args.part and not any(matches(n, p) for n in differ)]
    for node in new:
        print(f"passes without FILet and fails with it: {node}")
    for pattern in stale:
        print(f"{LIST.name} has {pattern}, which no longer differs")
    print(
        f"PEFT {importlib.metadata.version('peft')}: {len(with_filet)} tests with FILet, "
        f"{len(failed) - len(differ)} fail without it as well, {len(differ)} differ, "
        f"{len(differ) - len(new)} of them as {LIST.name} says"
    )
    return 1 if new or stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
