"""The compiled extension: that it links, its compilation on first use, and how a launch fails."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from filet_kernels import build, extension
from filet_kernels.extension import cuda_extension, why_no_extension

# Compiles in two seconds, where csrc/ takes many.
STAND_IN = {
    "include/filet/answer.h": "int answer();\n",
    "answer.cu": '#include "filet/answer.h"\n'
    "__global__ void kernel(int* out) { *out = 42; }\n"
    "int answer() { return 42; }\n",
    "bindings.cpp": """
#include <Python.h>
#include "filet/answer.h"
static PyObject* call(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
static PyMethodDef methods[] = {{"answer", call, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", "", -1, methods};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
""",
}
LACKING = build.missing(build.SOURCES)
needs_nvcc = pytest.mark.skipif(LACKING is not None, reason=f"nothing can be compiled: {LACKING}")

# Another process: as setup.py does, without importing torch.
ONE_OF_TWO = """
import importlib.util, logging, pathlib, sys
logging.basicConfig(level=logging.INFO)

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

print(load("_cuda", load("build", sys.argv[1]).cached(pathlib.Path(sys.argv[2]))).answer())
"""


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process of an installation without the extension."""
    monkeypatch.setitem(sys.modules, "filet_kernels._cuda", None)  # importing it fails
    extension._load.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a GPU, an empty cache, no extension, and the stand-in's sources."""
    tmp_path /= "it's: $1"  # nothing on the way to the compiler may break at it
    sources = tmp_path / "csrc"
    for name, text in STAND_IN.items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(extension, "_no_gpu", lambda: None)
    monkeypatch.setenv("FILET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FILET_BUILD_CUDA", raising=False)
    forget(monkeypatch)
    yield sources
    extension._load.cache_clear()


def test_it_is_there_where_it_can_be() -> None:
    reason, wish = why_no_extension(), os.environ.get("FILET_BUILD_CUDA", "")
    compilable = wish != "0" and LACKING is None and extension._no_gpu() is None
    if reason is not None and wish != "1" and not compilable:
        with pytest.raises(RuntimeError, match="the CUDA extension is not built"):
            cuda_extension()
        pytest.skip(reason)
    assert reason is None
    assert cuda_extension().syrk_sm90_flags() > 0


@pytest.mark.skipif(why_no_extension() is not None, reason="the extension is not built")
def test_a_failed_launch_says_why() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    C, X = torch.zeros(128, 128, device=device), torch.zeros(8, 128, device=device).bfloat16()
    cuda = cuda_extension()
    # Rows of 3 elements are no tensor map; without a driver nothing is.
    words = "invalid tensor map" if device == "cuda" else "driver"
    with pytest.raises(RuntimeError, match=rf"syrk_: launch failed with status -?\d+: .*{words}"):
        cuda.syrk_sm90(
            c=C.data_ptr(), stride_c=128, x=X.data_ptr(), stride_x=3, n=128, tokens=8, alpha=1.0,
            half=False, plan=cuda.SyrkPlan(cuda.SyrkKernel.pairs), flags=0, stream=0,
        )  # fmt: skip
    assert not C.any()


@needs_nvcc
def test_the_first_use_compiles_and_the_next_process_does_not(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_no_extension() is None
    assert cuda_extension().answer() == 42

    def refuse(*args: object) -> None:
        raise RuntimeError("compiled again")

    monkeypatch.setattr(build, "compile_to", refuse)
    forget(monkeypatch)
    assert cuda_extension().answer() == 42
    with open(sources / "include/filet/answer.h", "a") as header:
        header.write("// another version\n")
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="compiled again"):
        assert why_no_extension() is not None


@needs_nvcc
def test_two_processes_at_once(sources: Path) -> None:
    command = [sys.executable, "-c", ONE_OF_TWO, build.__file__, str(sources)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [process.communicate() for process in processes]
    assert [out for out, _ in printed] == ["42\n", "42\n"], printed
    assert sum(log.count("compiling") for _, log in printed) == 1, printed


@needs_nvcc
def test_a_failed_compilation_is_told_once(sources: Path) -> None:
    with open(sources / "bindings.cpp", "a") as file:
        file.write("#error no such luck\n")
    with pytest.warns(UserWarning, match="compiling it failed:\n(.*\n)*.*no such luck"):
        reason = why_no_extension()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert why_no_extension() == reason
    with pytest.raises(RuntimeError, match="no such luck"):
        cuda_extension()


def test_nothing_is_compiled_where_it_is_forbidden(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FILET_BUILD_CUDA", "0")
    assert "FILET_BUILD_CUDA=0 forbids" in str(why_no_extension())
    assert not Path(os.environ["FILET_CACHE"]).exists()


def test_nothing_is_compiled_on_import() -> None:
    program = "import filet_kernels.extension as e; print(e._load.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize(
    ("capability", "driver", "words"),
    [(None, 13, "no GPU"), ((7, 5), 13, "no GPU"), ((8, 0), 12, "the driver's"), ((9, 0), 13, "")],
)
def test_nothing_is_compiled_that_no_gpu_here_runs(
    capability: tuple[int, int] | None,
    driver: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(pointer: object) -> None:
        pointer._obj.value = 1000 * driver

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version))
    monkeypatch.setattr(build, "find_nvcc", lambda: build.Nvcc("nvcc", "13.0", 13))
    reason = extension._no_gpu()
    assert words in str(reason) if words else reason is None
