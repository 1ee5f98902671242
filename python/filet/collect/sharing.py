"""Modules that are called with the very same tensor: they share one input moment."""

from __future__ import annotations

import weakref

from torch import Tensor

__all__ = ["SharedInputs", "sharing_broke"]


class SharedInputs:
    """Which module each input of a batch belongs to, while its tensor lives.

    Attributes:
        of: module → the module whose input moment it shares, for the whole pass.
    """

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def clear(self) -> None:
        """Forget the inputs of a batch; who shares stays known."""
        self._seen.clear()

    def owner(self, x: Tensor) -> str | None:
        """The module whose input this very tensor was, unless it has been written to since."""
        reference, version, name = self._seen.get(id(x), (None, 0, ""))
        # Another tensor that has died since may have had the same id.
        if reference is None or reference() is not x or version != _version(x):
            return None
        return name

    def own(self, x: Tensor, name: str) -> None:
        """Note that x is the input of a module that has a moment of it."""
        self._seen[id(x)] = (weakref.ref(x), _version(x), name)


def sharing_broke(follower: str, leader: str, batch: int | None) -> ValueError:
    where = "" if batch is None else f" in batch {batch}"
    return ValueError(
        f"{follower} took the same input tensor as {leader} at first, but not{where} later; "
        "expected FiletConfig(share_inputs=False) for a model that changes its data flow"
    )


def _version(x: Tensor) -> int:
    """How often x was written to in place."""
    return 0 if x.is_inference() else x._version
