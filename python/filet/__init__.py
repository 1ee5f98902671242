"""FILet initialisation of LoRA adapters for transformers and PEFT models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filet.adapters import load, save_as_lora, write_residual
    from filet.blockwise import initialize_folder
    from filet.config import FiletConfig
    from filet.initialize import apply_statistics, initialize_lora_filet_weights
    from filet.memory import OutOfMemoryError
    from filet.plan import DevicePlan, Plan, estimate
    from filet.report import FiletReport, ModuleReport
    from filet.statistics import Statistics, collect_statistics

__all__ = [
    "DevicePlan",
    "FiletConfig",
    "FiletReport",
    "ModuleReport",
    "OutOfMemoryError",
    "Plan",
    "Statistics",
    "apply_statistics",
    "collect_statistics",
    "estimate",
    "initialize_folder",
    "initialize_lora_filet_weights",
    "load",
    "save_as_lora",
    "write_residual",
]

_MODULES = {
    "adapters": ("load", "save_as_lora", "write_residual"),
    "blockwise": ("initialize_folder",),
    "config": ("FiletConfig",),
    "initialize": ("apply_statistics", "initialize_lora_filet_weights"),
    "memory": ("OutOfMemoryError",),
    "plan": ("DevicePlan", "Plan", "estimate"),
    "report": ("FiletReport", "ModuleReport"),
    "statistics": ("Statistics", "collect_statistics"),
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: transformers takes seconds that `filet --help` has no use for.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"filet.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
