"""Forwards of modules, replaced for a time: also behind the hooks of a device map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Forwards"]


class Forwards:
    """Which modules have another forward for now."""

    def __init__(self) -> None:
        self._before: dict[nn.Module, tuple[str, Any]] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._before

    @staticmethod
    def own(module: nn.Module) -> Callable[..., Any] | None:
        """The forward of the module's class, where nobody has put another in its place."""
        # accelerate's hooks, which move inputs to the weights' device, keep and call it.
        held: Any = vars(module).get("_old_forward" if _is_mapped(module) else "forward")
        if held is not None and getattr(held, "__func__", None) is not type(module).forward:
            return None
        return held or module.forward

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Of a module that has its :meth:`own`."""
        name = "_old_forward" if _is_mapped(module) else "forward"
        self._before[module] = (name, vars(module).get(name))
        setattr(module, name, forward)

    def restore(self) -> None:
        for module, (name, before) in self._before.items():
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        self._before.clear()


def _is_mapped(module: nn.Module) -> bool:
    return "_hf_hook" in vars(module) and "_old_forward" in vars(module)
