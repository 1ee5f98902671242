"""A model that FSDP2 has sharded, beside the whole model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import filet
from filet import FiletConfig
from models import Case, case, llama, loader, peft_of, truth
from ranks import run, values

# Of each rank, its samples; in batches of 3 not equally many. One without any.
SPLITS = {2: (range(0, 7), range(7, 12)), 3: (range(0, 8), range(8, 12), range(0))}


def sharded(model: Any, size: int, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (size,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def batches_of(rank: int, size: int) -> list[Any]:
    samples = case("llama").samples
    return list(loader([samples[index] for index in SPLITS[size][rank]], 3))


def outcome(report: Any, model: Any) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    factors = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            p = p.detach()
            factors[name] = p.full_tensor() if isinstance(p, DTensor) else p.clone()
    return {
        "energies": {name: its.energies for name, its in report.modules.items()},
        "indices": {name: its.indices for name, its in report.modules.items()},
        "factors": factors,
        "left": report.left_default,
        "counts": (report.samples, report.tokens, report.loss_terms),
        "tokens": [(its.input_tokens, its.output_tokens) for its in report.modules.values()],
        "shared": [its.shared_input for its in report.modules.values()],
    }


def initialised(model: Any, batches: Any, keep: Any = None, **config: Any) -> dict[str, Any]:
    report = filet.initialize_lora_filet_weights(
        model, batches, FiletConfig(**config), keep=keep, show_progress_bar=False
    )
    return outcome(report, model)


def on_rank(rank: int, folder: Path, size: int, config: Any) -> Any:
    torch.manual_seed(3)
    return initialised(sharded(peft_of(case("llama")), size), batches_of(rank, size), **config)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_ranks_equal_one(size: int, start: str, tmp_path: Path) -> None:
    config = {"start": start, "samples": None}
    many = values(run(size, on_rank, tmp_path, size, config))
    torch.manual_seed(3)
    one = initialised(peft_of(case("llama")), list(loader(case("llama").samples, 3)), **config)
    from test_data_parallel import assert_as_one

    assert_as_one(many, one)
