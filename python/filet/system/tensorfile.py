"""safetensors files, written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
place of every tensor) and the tensors' bytes, one after the other. The library's own writer takes
all tensors at once, in host memory and as they shall be written: of the statistics of a model that
is a second copy of everything, 18 GiB for one of 8B.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from filet.system.files import replaced

__all__ = ["DTYPES", "write_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ALIGNMENT = 8  # bytes: the widest dtype's


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    finish: Callable[[Tensor], Any] = lambda copy: None,
) -> None:
    """Write a safetensors file; complete, or not there at all.

    Of one tensor at a time there is a copy, in host memory; none on the tensor's own device.

    Args:
        path: of the file. Its folder is created.
        tensors: on any device, with any strides. In the file the widest dtypes come first, so that
            all are aligned, and then names.
        metadata: text beside them.
        finish: changes the copy of a tensor in place before it is written.

    Raises:
        TypeError: a dtype that is not in :data:`DTYPES`.
        OSError: the file cannot be written; one that was there is left as it was.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(
                f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, _NAMES))}"
            )
        place = [start, start + tensor.nbytes]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place,
        }  # fmt: skip
        start = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replaced(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes_of(tensors[name], finish))


def _bytes_of(tensor: Tensor, finish: Callable[[Tensor], Any]) -> memoryview:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
    finish(copy)
    return copy.view(-1).view(torch.uint8).numpy().data
