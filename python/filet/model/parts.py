"""The plain tensors that quantised ones are made of, for fingerprints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DOUBLE", "comes_from", "flat", "is_a", "numbers", "tensors_in"]

DOUBLE = " with double quantisation"  # in the kind of a base whose scales are quantised too


def comes_from(kind: type, library: str) -> bool:
    """Whether a class is of a library, which is not imported."""
    return kind.__module__.partition(".")[0] == library


def is_a(module: Any, library: str, name: str) -> bool:
    """Whether a module is of this class, or of one made from it; the library is not imported."""
    kinds = type(module).__mro__
    return any(each.__name__ == name and comes_from(each, library) for each in kinds)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def tensors_in(meta: dict[str, Any]) -> list[Tensor]:
    """Those in a dictionary and in the dictionaries in it, by their keys."""
    found: list[Tensor] = []
    for key in sorted(meta):
        value = meta[key]
        if isinstance(value, Tensor):
            found.append(value.detach())
        elif isinstance(value, dict):
            found += tensors_in(value)
    return found


def flat(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor of torchao's is made of."""
    if not comes_from(type(tensor), "torchao"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return [plain for part in parts if part is not None for plain in flat(part)]
