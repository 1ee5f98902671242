"""A model that FSDP has divided between processes: its tensors, sums over them, and its modules.

FSDP2 (``fully_shard``) leaves each process some rows of every parameter, in a DTensor, and gathers
a module's parameters for its forward and backward. Inside these, a parameter is a plain tensor;
outside, what is asked of it is asked here. What gathers or adds up is collective: all processes
call it, for the same tensors in the same order.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from filet.distributed.group import current

__all__ = [
    "as_rows",
    "by_rows",
    "check_division",
    "columns_in_use",
    "divided",
    "gathering",
    "is_sharded",
    "local",
    "local_rows",
    "over_shards",
    "resharded",
    "running",
    "unit_of",
    "units",
    "whole",
    "write",
]


def is_sharded(tensor: Any) -> bool:
    """Whether of this tensor each process has a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """What of a tensor is here, detached: a view."""
    tensor = tensor.detach()
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return found


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every process; on the mesh's device, whatever was offloaded. Collective.

    It has the gradient of the tensor's.
    """
    if not is_sharded(tensor):
        found: Tensor = tensor
        return found
    if tensor.is_meta:  # accelerate shards a model there, before its weights come
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if tensor.device.type != tensor.device_mesh.device_type:
        tensor = tensor.to(tensor.device_mesh.device_type)
    found = tensor.full_tensor()
    return found


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> Callable[[], object]:
    """Write a value, which every process has whole, into a tensor: each its own part.

    The tensor stays, and what points to it. Returns what takes the value out again.
    """
    place = local(tensor)
    before = place.clone()
    place.copy_(local(divided(value, tensor)))
    return partial(place.copy_, before)


def local_rows(value: Tensor, like: Tensor) -> Tensor:
    """Those rows of a matrix, which every process has whole, that are here of a sharded one."""
    assert by_rows(like) and value.shape[0] == like.shape[0]
    return local(divided(value, like))


def divided(value: Tensor, like: Any) -> Tensor:
    """A value, which every process has whole, sharded as another tensor is, if it is.

    It lies where the other does, on the mesh's device where that is on the meta device.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    value = value if value.is_meta else value.to(mesh.device_type)
    part = distribute_tensor(value, mesh, like.placements, src_data_rank=None)
    return part if like.is_meta else part.to(like.device)


def by_rows(tensor: Any) -> bool:
    """Whether each process has some consecutive rows, all of them of the same tensor.

    So has FSDP's, also where it is repeated over one dimension of the mesh (HSDP). A transposed
    one has columns.
    """
    from torch.distributed.tensor import Shard

    divided = [each for each in tensor.placements if not each.is_replicate()]
    return len(divided) == 1 and type(divided[0]) is Shard and divided[0].dim == 0


def _first_row(tensor: Any) -> int:
    """Which row of the whole is the first one here."""
    dim = next(i for i, each in enumerate(tensor.placements) if not each.is_replicate())
    rows, mesh = len(tensor), tensor.device_mesh
    place: int = mesh.get_local_rank(dim)
    return min(place * -(-rows // int(mesh.size(dim))), rows)


def as_rows(tensor: Any) -> Tensor:
    """A tensor of any shape as (m, n), sharded as it was; detached."""
    tensor = tensor.detach()
    m = len(tensor) if tensor.dim() else 1
    n = math.prod(tensor.shape[1:])
    if not is_sharded(tensor) or not by_rows(tensor):
        return whole(tensor).reshape(m, n)
    from torch.distributed.tensor import DTensor

    part = tensor.to_local()
    return DTensor.from_local(
        part.reshape(len(part), n), tensor.device_mesh, tensor.placements, run_check=False,
        shape=torch.Size((m, n)), stride=(n, 1),
    )  # fmt: skip


def over_shards(tensors: Iterable[Any], function: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """``function(rows, first)`` of each matrix; of a sharded one added up over its rows.

    Collective. Of all that lie alike it goes over the network once.

    Args:
        tensors: none is kept: they may be made as they are asked for.
        function: integers, of one shape whatever rows there are, also none; ``first`` is the place
            of the first one in the whole.
    """
    found: list[Tensor] = []
    alike: dict[Any, list[int]] = {}
    waiting = False
    with contextlib.ExitStack() as stack:
        for index, tensor in enumerate(tensors):
            if not is_sharded(tensor):
                found.append(function(tensor, 0))
                continue
            if not waiting:
                stack.enter_context(gathering())
                waiting = True
            if by_rows(tensor):
                found.append(function(local(tensor), _first_row(tensor)))
                alike.setdefault((tensor.device_mesh, tensor.placements), []).append(index)
            else:
                found.append(function(whole(tensor).detach(), 0))
        for (mesh, placements), indices in alike.items():
            total = _sum(torch.cat([found[i].reshape(-1) for i in indices]), mesh, placements)
            parts = total.split([found[i].numel() for i in indices])
            for index, part in zip(indices, parts, strict=True):
                found[index] = part.view(found[index].shape)
    return found


@contextlib.contextmanager
def gathering() -> Iterator[None]:
    """Inside, the processes wait for each other's parts of a sharded model. Collective.

    Who failed before says so here; who fails inside cannot (:meth:`Group.untold`).
    """
    group = current()
    if group is None:
        yield
        return
    group.settle()
    with group.untold():
        yield


def _sum(numbers: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Over the dimensions of the mesh along which tensors are divided."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    how = [Replicate() if each.is_replicate() else Partial() for each in placements]
    partial = DTensor.from_local(numbers.to(mesh.device_type), mesh, how, run_check=False)
    found: Tensor = partial.full_tensor()
    return found


def columns_in_use(rows: Tensor, _: int) -> Tensor:
    """For :func:`over_shards`: of each column, in how many places it has a number that is not 0."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1], dtype=torch.int64)
    used: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=0) != 0
    return used.long()


def units(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers and gives up as one, the outer ones first."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def unit_of(model: nn.Module, module: Any) -> Any:
    """The unit that gathers a module's weight, the innermost around it; None where none does."""
    around = [unit for unit in units(model) if module in unit.modules()]
    return around[-1] if around and is_sharded(module.weight) else None


def resharded(model: nn.Module) -> None:
    """Give up what FSDP2 keeps gathered, so that the parameters found are those that train.

    The outermost module keeps its own after a forward, until there is a backward.
    """
    for unit in units(model):
        unit.reshard()


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run, and what asks for a gradient may be another than before.

    FSDP2 looks at that before the first forward of all, for what it does with the gradients of
    the training: so that is done here, before anything is frozen.
    """
    roots = _roots(units(model))
    states = [root._get_fsdp_state() for root in roots]
    for state in states:
        state._lazy_init()
    try:
        yield
    except BaseException:
        for root, state in zip(roots, states, strict=True):
            # A forward may have ended halfway. Before torch 2.13 there was nothing against it.
            if state._is_root and hasattr(root, "reset_iter_state"):
                root.reset_iter_state()
        raise
    finally:
        resharded(model)


def _roots(found: list[Any]) -> list[Any]:
    """Those of the units that lie in no other."""
    roots: list[Any] = []
    inside: set[Any] = set()
    for unit in found:
        if unit not in inside:
            roots.append(unit)
            inside.update(unit.modules())
    return roots


def check_division(model: Any) -> None:
    """ValueError for a model that is divided between processes in another way than by FSDP2."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    modules, parameters = list(model.modules()), list(model.parameters())
    flat = any(hasattr(parameter, "_fsdp_flattened") for parameter in parameters)
    if flat or (fsdp is not None and any(isinstance(module, fsdp) for module in modules)):
        raise ValueError(
            "the model is in FSDP 1 (FullyShardedDataParallel), whose flat parameters hide the "
            "weights of the layers; expected FSDP 2: fully_shard, or fsdp_version=2 of accelerate"
        )
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(
            "the model is divided by DeepSpeed's ZeRO-3, which fetches weights for a forward "
            "alone; expected the adapter made before the training: 'torchrun -m filet.cli init' "
            "writes its folder, filet.load or PeftModel.from_pretrained loads it"
        )
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    of_fsdp = {id(p) for root in _roots(units(model)) for p in root.parameters()}
    tensor_parallel = any((vars(module).get("_tp_size") or 1) > 1 for module in modules)
    for parameter in sharded:
        divided = [each for each in parameter.placements if not each.is_replicate()]
        tensor_parallel |= len(divided) > 1 or id(parameter) not in of_fsdp
    if tensor_parallel:
        raise ValueError(
            "the model is tensor parallel, each process having a part of a layer's weight in its "
            "forward too, where PEFT's own LoRA layers fail; expected FSDP 2 (fully_shard), or the "
            "adapter made by 'torchrun -m filet.cli init' and loaded"
        )
    of_all = dist.get_world_size() if sharded else 0
    for parameter in sharded:
        if parameter.device_mesh.size() != of_all:
            raise ValueError(
                f"FSDP has divided the model between {parameter.device_mesh.size()} of {of_all} "
                "processes; expected a mesh of all of them"
            )
