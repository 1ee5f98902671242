"""Runs of the blockwise engine on small models, and what their results are held against."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import models
from filet import FiletConfig, FiletReport
from filet.blockwise.disk import Disk
from filet.blockwise.engine import Blockwise, blockwise_run
from filet.blockwise.folder import empty_model
from filet.blockwise.machine import Machine
from filet.blockwise.weights import ShardedWeights
from filet.initialize import initialize_folder
from models import SMALL

MOE = {**SMALL, "num_experts_per_tok": 2}
LAYERS = 5

# Sliding windows shorter than the samples: blocks of one model get different masks.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: models.llama(LAYERS),
    "gpt2": lambda: models.case("gpt2").model,
    "opt": lambda: models.case("opt").model,
    "one block": lambda: models.llama(1),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, sliding_window_pattern=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, head_dim=16)
    ),
}


_models = tempfile.TemporaryDirectory(prefix="filet-tests-")


@functools.cache
def model_folder(kind: str) -> Path:
    """The folder of a model of that kind, in several shards."""
    path = Path(_models.name) / kind
    models.randomised(copy.deepcopy(MODELS[kind]())).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


# Of every test in this folder.
MARKS = [
    pytest.mark.usefixtures("one_thread", "no_picture"),
    # PEFT's, of patterns that it made itself for experts.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]


def lora(**settings: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **settings})


def batches(side: str = "right") -> list[dict[str, Tensor]]:
    return list(models.loader(models._text(1), side=side))


def kept(seed: int = 2, size: int = 3, side: str = "right") -> list[dict[str, Tensor]]:
    """Batches of data to keep: other samples than :func:`batches`, in other batches, unlabelled."""
    found = list(models.loader(models._text(seed)[:7], size, side))
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in found]


CHEAP: dict[str, Any] = {"lora_config": lora(target_modules=["q_proj", "up_proj"])}


def boundary(given: list[dict[str, Tensor]]) -> int:
    """Bytes of a boundary of these batches."""
    sizes = [batch["input_ids"].numel() * SMALL["hidden_size"] * 4 for batch in given]
    return sum(-(-size // 4096) * 4096 for size in sizes)


BOUNDARY = boundary(batches())


def initialize(
    folder: Path,
    output: Path,
    engine: str = "blockwise",
    machine: Machine | None = None,
    **more: Any,
) -> FiletReport:
    """:func:`filet.initialize_folder`; with a ``machine`` what it does by the blockwise engine."""
    settings: dict[str, Any] = {
        "batches": batches(),
        "lora_config": lora(),
        "show_progress_bar": False,
        "device": "cpu",
        **more,
    }
    if machine is None:
        return initialize_folder(folder, output=output, engine=engine, **settings)
    device = torch.device(settings.pop("device"))
    unset: dict[str, Any] = {"trust_remote_code": False, "quantization_config": None}
    unset |= {"config": FiletConfig(), "dtype": "auto", "task": "causal-lm"}
    settings = {**unset, **settings}
    with blockwise_run(folder, output=output, device=device, machine=machine, **settings) as run:
        run.sweep()
        return run.write(output)


def run_of(folder: Path, place: Path, model: Any = None, **more: Any) -> Blockwise:
    model = model or empty_model(folder)
    settings: dict[str, Any] = {
        "batches": batches(),
        "lora_config": lora(),
        "config": FiletConfig(),
        "device": torch.device("cpu"),
        "run_folder": place / "run",
        "show_progress_bar": False,
        **more,
    }
    source = settings.pop("source", None) or ShardedWeights(folder, model)
    return Blockwise(model, source, **settings)


def assert_equal(one: FiletReport, other: FiletReport, rel: float, *, choices: bool = True) -> None:
    """Same choices, energies to ``rel``; everything else the same."""
    assert one.modules.keys() == other.modules.keys()
    for name, mine in one.modules.items():
        theirs = other.modules[name]
        torch.testing.assert_close(
            mine.energies, theirs.energies, rtol=rel, atol=0, equal_nan=True, msg=name
        )
        assert not choices or torch.equal(mine.indices, theirs.indices), name
        for key in ("shape", "rank", "input_space", "output_space", "input_tokens",
                    "output_tokens", "shared_input"):  # fmt: skip
            assert getattr(mine, key) == getattr(theirs, key), (name, key)
    for key in ("left_default", "samples", "tokens", "loss_terms", "data"):
        assert getattr(one, key) == getattr(other, key), key


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path, rel: float = 1e-5) -> None:
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        # The engines form the head's products over other rows, so the gradients' last bits differ.
        error = (value - theirs[name]).abs().max()
        assert error <= rel * theirs[name].abs().max(), (name, error)


class Crash(Exception):
    pass


class InStep(ThreadPoolExecutor):
    """Every file is written before the next begins: what a test finds does not depend on time."""

    def submit(self, *args: Any, **more: Any) -> Future[Any]:  # type: ignore[override]
        future = super().submit(*args, **more)
        wait([future])
        return future


def in_step(**more: Any) -> Machine:
    return Machine(writers=InStep, **more)


class Failing(Disk):
    """No arena can be written any more after so many."""

    def __init__(self, error: BaseException, after: int = 2) -> None:
        super().__init__()
        self.error = error
        self.left = after

    def save(self, path: Path, *args: Any, **more: Any) -> None:
        if is_arena(path):
            self.left -= 1
            if self.left < 0:
                raise self.error
        super().save(path, *args, **more)


def is_arena(path: Path) -> bool:
    """Whether a file, or what will become it, is of a gradient or of a block's inputs."""
    return re.match(r"\.?(gradient|inputs)-\d+\.raw", path.name) is not None
