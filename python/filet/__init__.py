"""FILet initialisation of LoRA adapters for transformers and PEFT models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filet.adapter.saved import load, save_as_lora
    from filet.adapter.write import write_residual
    from filet.collect.estimate import estimate
    from filet.collect.plan import DevicePlan, Plan
    from filet.collect.statistics import Statistics, collect_statistics
    from filet.config import FiletConfig
    from filet.initialize import (
        apply_statistics,
        initialize_folder,
        initialize_lora_filet_weights,
    )
    from filet.report.modules import ModuleReport
    from filet.report.report import FiletReport
    from filet.system.memory import OutOfMemoryError
    from filet.trainer import FiletInitCallback, initialize_from_trainer

__all__ = [
    "DevicePlan",
    "FiletConfig",
    "FiletInitCallback",
    "FiletReport",
    "ModuleReport",
    "OutOfMemoryError",
    "Plan",
    "Statistics",
    "apply_statistics",
    "collect_statistics",
    "estimate",
    "initialize_folder",
    "initialize_from_trainer",
    "initialize_lora_filet_weights",
    "load",
    "save_as_lora",
    "write_residual",
]

_MODULES = {
    "adapter.saved": ("load", "save_as_lora"),
    "adapter.write": ("write_residual",),
    "collect.estimate": ("estimate",),
    "collect.plan": ("DevicePlan", "Plan"),
    "collect.statistics": ("Statistics", "collect_statistics"),
    "config": ("FiletConfig",),
    "initialize": ("apply_statistics", "initialize_folder", "initialize_lora_filet_weights"),
    "report.modules": ("ModuleReport",),
    "report.report": ("FiletReport",),
    "system.memory": ("OutOfMemoryError",),
    "trainer": ("FiletInitCallback", "initialize_from_trainer"),
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: transformers takes seconds that `filet --help` has no use for.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"filet.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
