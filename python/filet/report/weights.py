"""The adapter's weights that lie beside a report: whether they are what it is of."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from filet.report.modules import ModuleReport
from filet.report.names import REPORT_FILE, WEIGHTS_FILE

__all__ = ["PREFIX", "SUFFIX", "check_beside", "digest_of"]

PREFIX = "base_model.model."  # PEFT's, before the name of a module
SUFFIX = ".lora_A.weight"


def digest_of(folder: Path) -> str:
    """Hexadecimal BLAKE2 of the weights' file; "" where there is none."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_beside(folder: Path, modules: Mapping[str, ModuleReport], digest: str) -> None:
    """ValueError, naming the first module, where the weights are of other modules or ranks.

    A frozen half, or a difference to where an adapter started, has twice the rank. A warning where
    they are not those of the ``digest`` ("": it is not known), as after training.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            shapes = {
                key.removeprefix(PREFIX).removesuffix(SUFFIX): file.get_slice(key).get_shape()
                for key in file.keys()
                if key.startswith(PREFIX) and key.endswith(SUFFIX)
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    for name, module in modules.items():
        rank, n = shapes.get(name.replace("_orig_mod.", ""), (0, 0))  # as PEFT saves it
        if rank in (module.rank, 2 * module.rank) and n == module.shape[1]:
            continue
        theirs = f"a factor A of {rank} x {n}" if rank else "none"
        raise ValueError(
            f"the report in {folder} is of another adapter than lies beside it: it has rank "
            f"{module.rank} and {module.shape[1]} inputs at {name}, where {WEIGHTS_FILE} has "
            f"{theirs}; expected both of one save ({folder / REPORT_FILE} alone can be read)"
        )
    if digest and digest != digest_of(folder):
        warnings.warn(
            f"the adapter in {folder} was saved again since its report was: it was trained since, "
            "or is another one",
            stacklevel=3,
        )
