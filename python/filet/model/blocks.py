"""Which block of a model a module lies in."""

from __future__ import annotations

from filet.model.targets import Target

__all__ = ["blocks"]


def blocks(targets: dict[str, Target]) -> dict[str, list[str]]:
    """The targets by block: what their names share up to the first number in it.

    "model.layers.3.mlp.up_proj" is in "model.layers.3". All without a number make one block.
    """
    found: dict[str, list[str]] = {}
    for name in targets:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        found.setdefault(".".join(parts[: number + 1]), []).append(name)
    return found
