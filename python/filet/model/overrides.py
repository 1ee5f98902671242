"""Forwards of modules, replaced for a time: also behind the hooks of a device map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["own_forward", "replaced"]


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of the module's class, None where somebody has put another in its place."""
    # accelerate's hooks, which move inputs to the weights' device, keep and call it.
    held: Any = vars(module).get(_name(module))
    if held is not None and getattr(held, "__func__", None) is not type(module).forward:
        return None
    return held or module.forward


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[set[nn.Module]]:
    """Inside, these modules have these forwards, except those that have not their own before.

    Gives the modules whose forward is replaced.
    """
    mine = {
        module: forward for module, forward in forwards.items() if own_forward(module) is not None
    }
    before = {module: (_name(module), vars(module).get(_name(module))) for module in mine}
    try:
        for module, forward in mine.items():
            setattr(module, before[module][0], forward)
        yield set(mine)
    finally:
        for module, (name, held) in before.items():
            if held is not None:
                setattr(module, name, held)
            elif name in vars(module):
                delattr(module, name)


def _name(module: nn.Module) -> str:
    """The attribute by which the module's forward is found."""
    mapped = "_hf_hook" in vars(module) and "_old_forward" in vars(module)
    return "_old_forward" if mapped else "forward"
