"""The targets by block."""

from __future__ import annotations

from filet.model.targets import Target
from filet.system.names import split

__all__ = ["blocks"]


def blocks(targets: dict[str, Target]) -> dict[str, list[str]]:
    """The targets by the block that they lie in, in the model's order.

    "model.layers.3.mlp.up_proj" is in "model.layers.3". All that lie in none make one block.
    """
    found: dict[str, list[str]] = {}
    for name in targets:
        found.setdefault(split(name).block, []).append(name)
    return found
