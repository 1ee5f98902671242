"""Models that FSDP2 shards, and what comes of an initialisation of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import filet
from filet import FiletConfig
from models import case, loader

# Of each rank, its samples; in batches of 3 not equally many. One without any.
SPLITS = {
    2: (range(0, 7), range(7, 12)),
    3: (range(0, 8), range(8, 12), range(0)),
    4: (range(0, 4), range(0), range(4, 11), range(11, 12)),
}


def sharded(model: Any, mesh: tuple[int, ...], device: str = "cpu", **how: Any) -> Any:
    """By its blocks, over a mesh of so many processes, the rest as the root of all."""
    names = ("replicate", "shard")[-len(mesh) :]
    devices = init_device_mesh(device, mesh, mesh_dim_names=names)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for block in lists[0]:
        fully_shard(block, mesh=devices, **how)
    return fully_shard(model, mesh=devices, **how)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Its parameters; buffers of positions stay, whose rounding would move energies by percents."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def batches_of(kind: str, rank: int, size: int) -> list[Any]:
    samples = case(kind).samples
    return list(loader([samples[index] for index in SPLITS[size][rank]], 3))


def all_batches(kind: str, size: int) -> list[Any]:
    """Those of all ranks, for one process."""
    return [batch for rank in range(size) for batch in batches_of(kind, rank, size)]


def sharded_on_a_cpu() -> None:
    """accelerate shards on GPUs alone; torch on a CPU as well."""
    from accelerate.state import AcceleratorState, DistributedType

    plain: Any = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def whole(tensor: Any) -> Tensor:
    """By torch's own way."""
    tensor = tensor.detach()
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    return found


def outcome(report: Any, model: Any) -> dict[str, Any]:
    """What all ranks have to have alike, and what is compared with one process."""
    return {
        "energies": {name: its.energies for name, its in report.modules.items()},
        "indices": {name: its.indices for name, its in report.modules.items()},
        "factors": {n: whole(p) for n, p in model.named_parameters() if "lora_" in n},
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
