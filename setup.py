"""Build of the optional CUDA extension; everything else is in pyproject.toml.

``filet_kernels._cuda`` is compiled from ``csrc/*.cu`` and ``csrc/*.cpp`` on Linux when nvcc (CUDA
12 or later) is on PATH; where that fails, the package is installed without it. FILET_BUILD_CUDA=1
demands it, FILET_BUILD_CUDA=0 forbids it. No GPU is probed.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sources = sorted([*Path("csrc").glob("*.cu"), *Path("csrc").glob("*.cpp")])
nvcc, wish = shutil.which("nvcc"), os.environ.get("FILET_BUILD_CUDA", "")
if wish not in ("", "0", "1"):
    raise SystemExit(f"FILET_BUILD_CUDA must be 0 or 1, got {wish!r}")
if wish == "1" and not sources:
    raise SystemExit("FILET_BUILD_CUDA=1, but csrc/ holds no CUDA sources to build")
if wish == "1" and not nvcc:
    raise SystemExit("FILET_BUILD_CUDA=1, but nvcc is not on PATH")


class BuildWithNvcc(build_ext):
    def build_extension(self, ext):
        import pybind11

        headers = ["csrc/include", pybind11.get_include(), sysconfig.get_path("include")]
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-I{folder}" for folder in headers]
        target, objects = Path(self.get_ext_fullpath(ext.name)), []
        for folder in (target.parent, Path(self.build_temp)):
            folder.mkdir(parents=True, exist_ok=True)
        for source in map(Path, ext.sources):
            archs = ["90a"] if source.stem.endswith("_sm90") else ["80", "90a"]
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            objects.append(str(Path(self.build_temp, source.name + ".o")))
            self.spawn([nvcc, *flags, *codes, "-c", str(source), "-o", objects[-1]])
        self.spawn([nvcc, "-shared", *objects, "-o", str(target)])  # cudart is linked statically


wanted = wish == "1" or (wish == "" and nvcc and sources and sys.platform == "linux")
extension = Extension(
    "filet_kernels._cuda", [str(source) for source in sources], optional=wish != "1"
)
setup(ext_modules=[extension] if wanted else [], cmdclass={"build_ext": BuildWithNvcc})
