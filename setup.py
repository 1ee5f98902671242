"""Build of the optional CUDA extension; everything else is in pyproject.toml.

``filet_kernels._cuda`` is compiled from csrc/ on Linux where nvcc (CUDA 12 or later) is found. If
that fails, the package is installed without it, and compiles it on first use where it can.
FILET_BUILD_CUDA=1 demands it, FILET_BUILD_CUDA=0 forbids it. No GPU is probed.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# By path: importing the package would import torch, which is not needed to build.
spec = importlib.util.spec_from_file_location("build", "filet_kernels/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

wish, missing = os.environ.get("FILET_BUILD_CUDA", ""), build.missing(build.SOURCES)
if wish not in ("", "0", "1"):
    raise SystemExit(f"FILET_BUILD_CUDA must be 0 or 1, got {wish!r}")
if wish == "1" and missing:
    raise SystemExit(f"FILET_BUILD_CUDA=1, but {missing}")


class BuildWithNvcc(build_ext):
    def build_extension(self, ext):
        try:
            build.compile_to(Path(self.get_ext_fullpath(ext.name)), build.SOURCES)
        except RuntimeError as error:
            raise CompileError(str(error)) from None


extension = Extension("filet_kernels._cuda", [], optional=wish != "1")
setup(
    ext_modules=[extension] if wish != "0" and not missing else [],
    cmdclass={"build_ext": BuildWithNvcc},
)
