"""Compilation of csrc/ with nvcc and ninja, ahead of time by setup.py or on first use.

It imports neither torch nor this package: setup.py, which must run without them, loads it by path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["MODULE", "SOURCES", "Nvcc", "cached", "compile_to", "find_nvcc", "missing"]

# In the package where it is installed, beside it in the repository.
SOURCES = Path(__file__).resolve().parent / "csrc"
if not SOURCES.is_dir():
    SOURCES = SOURCES.parent.parent / "csrc"
MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"  # the suffix names Python's ABI


class Nvcc(NamedTuple):
    path: str
    version: str  # all that it says of itself
    major: int  # the CUDA release


def find_nvcc() -> Nvcc | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return None
    path = os.path.abspath(path)  # it is run in another folder
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", version)
    return Nvcc(path, version, int(release[1]) if release else 0)


def missing(sources: Path) -> str | None:
    """What compiling them lacks on this machine, or None."""
    if sys.platform != "linux":
        return f"the platform is {sys.platform}; expected linux"
    if not any(sources.glob("*.cu")):
        return f"{sources} holds no CUDA sources"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found"
    if nvcc.major < 12:
        return f"{nvcc.path} is of CUDA {nvcc.major}; expected 12 or later"
    if not (os.environ.get("NVCC_CCBIN") or shutil.which("g++")):
        return "g++ was not found"
    if _ninja() is None:
        return "ninja was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are not installed"
    return None


def _ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):  # its script need not be on PATH
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    return [program] if program else None


def _build_file(sources: Path, nvcc: str) -> str:
    """The text of build.ninja, for a folder in which csrc is the sources."""
    import pybind11

    headers = ["csrc/include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [f"-I{folder}" for folder in headers]
    lines = [
        f"nvcc = {shlex.join([nvcc]).replace('$', '$$')}",
        f"flags = {shlex.join(flags).replace('$', '$$')}",
        "rule compile",
        "  command = $nvcc $flags $codes -c $in -o $out",
        "  description = $in",
        "rule link",  # cudart is linked statically
        "  command = $nvcc -shared $in -o $out",
        "  description = $out",
    ]
    objects = []
    for source in sorted([*sources.glob("*.cu"), *sources.glob("*.cpp")]):
        archs = ["90a"] if source.stem.endswith("_sm90") else ["80", "90a"]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: compile csrc/{source.name}")
        lines.append(f"  codes = {' '.join(codes)}")
    return "\n".join([*lines, f"build {MODULE}: link {' '.join(objects)}", ""])


def compile_to(module: Path, sources: Path) -> None:
    """Compile the sources into the extension module; it appears complete or not at all.

    Raises:
        RuntimeError: a command failed; the message is what it printed.
    """
    nvcc, ninja = find_nvcc(), _ninja()
    assert nvcc is not None and ninja is not None, missing(sources)
    module.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=module.parent) as scratch:
        Path(scratch, "csrc").symlink_to(sources.resolve())  # its path may be one nvcc breaks at
        Path(scratch, "build.ninja").write_text(_build_file(sources, nvcc.path))
        done = subprocess.run(
            ninja, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stdout)
        os.replace(Path(scratch, MODULE), module)


def cached(sources: Path) -> Path:
    """The extension module compiled from the sources: from the cache, or compiled into it.

    The cache is $FILET_CACHE, or filet_kernels in the user's cache folder. Of processes that ask at
    once the first compiles and the others wait; where it fails, they fail too, without a try each.

    Raises:
        RuntimeError: a command failed; the message is what it printed.
        OSError: the cache cannot be written.
    """
    import fcntl  # not on every platform on which this file is imported

    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("FILET_CACHE") or Path(user, "filet_kernels"))
    folder = cache.resolve() / _key(sources)
    module, failure = folder / MODULE, folder / "failure.txt"
    if module.exists():
        return module
    asked = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # closing it unlocks
        fcntl.flock(lock, fcntl.LOCK_EX)
        if module.exists():
            return module
        if failure.exists() and failure.stat().st_mtime > asked:
            raise RuntimeError(failure.read_text())
        logging.getLogger("filet_kernels").info("compiling %s into %s", sources, folder)
        try:
            compile_to(module, sources)
        except RuntimeError as error:
            failure.write_text(str(error))
            raise
    return module


def _key(sources: Path) -> str:
    """A name for what the module depends on. The flags are in this file."""
    import pybind11

    nvcc = find_nvcc()
    assert nvcc is not None
    variables = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
    parts = [MODULE, pybind11.__version__, nvcc.version, *map(os.environ.get, variables)]
    key = hashlib.sha256(repr(parts).encode())
    for path in [Path(__file__), *sorted(filter(Path.is_file, sources.rglob("*")))]:
        text = path.read_bytes()
        key.update(f"{path.name} {len(text)}\n".encode() + text)
    return key.hexdigest()[:16]
