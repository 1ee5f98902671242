"""Where a module lies, told by its path: in which list of blocks, at which place, and what there.

It lies on the ground floor since it reads names alone, and reports sort modules by it as well.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Place", "split"]


@dataclass(frozen=True)
class Place:
    """A module's path, taken apart at the number of its block.

    Attributes:
        path: of the list of blocks, ("model", "layers") for "model.layers.3.mlp.up_proj".
        index: of the block in it, 3; None for a module in no block.
        rest: the path within the block, ("mlp", "up_proj"); the whole one where there is no block.
    """

    path: tuple[str, ...]
    index: int | None
    rest: tuple[str, ...]

    @property
    def block(self) -> str:
        """The block's own path, "model.layers.3"; "" for a module in no block."""
        return "" if self.index is None else ".".join((*self.path, str(self.index)))


def split(name: str, path: str | None = None) -> Place:
    """The place of a module: in the blocks at ``path``, or by default at its name's first number.

    A module that is not below ``path``, or has no number there, lies in no block.
    """
    parts = tuple(name.split("."))
    if path is None:
        at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    else:
        at = path.count(".") + 1 if name.startswith(f"{path}.") else None
    if at is None or not parts[at].isdecimal():
        return Place((), None, parts)
    return Place(parts[:at], int(parts[at]), parts[at + 1 :])
