"""Whether the weight of a module is numbers, or codes of some library's."""

from __future__ import annotations

from typing import Any

from torch import nn

from filet.model.values import Unreadable, dtype_of_model, values_of

__all__ = ["is_quantised"]


def is_quantised(module: nn.Module, model: Any) -> bool:
    """Whether it keeps codes; ``model``: that it is of. Codes may lie in a floating dtype."""
    try:
        return values_of(module, dtype_of_model(model)).quantised
    except Unreadable:
        return any(not value.is_floating_point() for value in module.parameters(recurse=False))
