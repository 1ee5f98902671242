"""What the library makes lies where it says and has the dtype that it says.

Whatever ``torch.set_default_device`` and ``torch.set_default_dtype`` were given.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import filet
import filet_kernels
import models
from filet import FiletConfig
from models import case, loader, peft_of

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [str(Path(package.__file__ or "").parent) for package in (filet, filet_kernels)]


class Placed(TorchFunctionMode):
    """Notes where our own code makes a tensor without a device."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self.without: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors():
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(tuple(OURS)):
                self.made += 1
                if kwargs.get("device") is None:
                    self.without.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return func(*args, **kwargs)


# Whose dtype is torch's default where none is named; that of what they are given, of numbers.
TYPED = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}


@pytest.mark.parametrize("word", ["device", "dtype"])
def test_every_factory_names_its(word: str) -> None:
    """Also those that only a GPU reaches."""
    names = {func.__name__ for func in _device_constructors()} - {"frombuffer"}  # in host memory
    without = [
        f"{path}:{call.lineno}"
        for root in OURS
        for path in Path(root).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func)
        in {f"torch.{name}" for name in (TYPED if word == "dtype" else names)}
        and not any(each.arg in (word, None) for each in call.keywords)
    ]
    assert not without


def check(mode: Placed) -> None:
    assert mode.made and not mode.without


@pytest.mark.parametrize(
    ("config", "keep"),
    [
        ({}, None),
        ({"start": "untouched", "fisher": "sampled"}, None),
        ({"normalization": "mean", "select": "max", "passes": 2}, None),
        ({}, "self"),
        ({}, "batches"),
    ],
)
def test_in_memory(config: dict[str, Any], keep: Any, tmp_path: Path) -> None:
    c = case("llama")
    model, batches = peft_of(c), list(loader(c.samples, 3))
    with Placed() as mode:
        report = filet.initialize_lora_filet_weights(
            model, batches, FiletConfig(**{"samples": 6, **config}), show_progress_bar=False,
            keep=batches if keep == "batches" else keep,
        )  # fmt: skip
        filet.save_as_lora(model, tmp_path / "adapter", report=report)
        filet.load(models.llama(2), tmp_path / "adapter")
        statistics = filet.collect_statistics(peft_of(c), batches, show_progress_bar=False)
        statistics.save(tmp_path / "statistics.safetensors")
        filet.Statistics.load(tmp_path / "statistics.safetensors").merge(statistics)
    check(mode)


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_of_a_folder(engine: Any, tmp_path: Path) -> None:
    models.llama(2).save_pretrained(tmp_path / "base")
    ids = torch.arange(24).view(3, 8) % 16
    batches = [{"input_ids": ids, "labels": ids}]
    with Placed() as mode:
        filet.initialize_folder(
            tmp_path / "base", batches, tmp_path / "out",
            LoraConfig(r=2, target_modules=["q_proj"]), engine=engine, device="cpu",
            keep=batches, show_progress_bar=False,
            save_statistics=tmp_path / "statistics.safetensors",
        )  # fmt: skip
    check(mode)
