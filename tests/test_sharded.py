"""An initialised adapter under FSDP 1 and 2, in one process, and under DDP in two.

FSDP looks for a parameter by its name in the module, where an initialised factor shows both of its
halves. DDP gives all ranks what rank 0 has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import filet
from filet import FiletConfig
from filet.model.factors import StartedFactor
from initialised import LOUD
from models import case, collate, loader, peft_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # FSDP's, of a CPU and of one process
]
VERSIONS = pytest.mark.parametrize("version", [1, 2])


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def initialised() -> PeftModel:
    model = peft_of(case("llama"))
    filet.initialize_lora_filet_weights(
        model,
        loader(case("llama").samples),
        FiletConfig(**LOUD, samples=None),
        show_progress_bar=False,
    )
    return model.eval()  # no dropout


def sharded(model: PeftModel, version: int) -> nn.Module:
    if version == 1:
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**collate(case("llama").samples)).logits
    return found


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in loader(case("llama").samples):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@VERSIONS
def test_it_trains_as_without(version: int) -> None:
    alone = initialised()
    start, before = logits(alone), {n: p.clone() for n, p in alone.named_parameters()}
    together = sharded(initialised(), version)
    torch.testing.assert_close(logits(together), start)
    train(alone)
    train(together)
    torch.testing.assert_close(logits(together), logits(alone), rtol=1e-4, atol=1e-4)
    moved = [n for n, p in alone.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [n for n, p in alone.named_parameters() if p.requires_grad]


@VERSIONS
def test_what_is_saved_is_both_halves(version: int) -> None:
    model = initialised()
    starts = {n: m.start.clone() for n, m in model.named_modules() if isinstance(m, StartedFactor)}
    together = sharded(model, version)
    train(together)
    expected = logits(together)
    state: dict[str, Any] = get_peft_model_state_dict(together)
    for name, start in starts.items():
        whole = state[name.replace(".default", "") + ".weight"]
        dim = 0 if ".lora_A" in name else 1
        assert torch.equal(whole.tensor_split(2, dim)[1], start)
    again = initialised()
    set_peft_model_state_dict(again, state)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def _rank_of_two(rank: int, folder: str) -> None:
    """Each with data of its own, as a sampler or a prepared loader hands them out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    model = peft_of(case("llama"))
    batches = list(loader(case("llama").samples[:8], 2))  # four: as many a rank
    filet.initialize_lora_filet_weights(
        model,
        batches[rank::2],
        FiletConfig(**LOUD, samples=None),
        show_progress_bar=False,
    )
    model.eval()
    batch = batches[0]
    factors = [m for m in model.modules() if isinstance(m, StartedFactor)]
    for each in factors:  # they have chosen together
        both = [torch.empty_like(each.start) for _ in range(2)]
        dist.all_gather(both, each.start)
        assert torch.equal(both[0], both[1])
        if rank:  # as if they had not
            each.start += 0.1
    starts = [each.start.clone() for each in factors]
    parallel = DistributedDataParallel(model)
    with torch.no_grad(), model.disable_adapter():
        original = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, original, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for each in batches[rank::2]:
        parallel(**each).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(**batch).logits
    theirs = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(theirs, logits)
    assert torch.equal(theirs[0], theirs[1])
    assert (logits - original).abs().max() > 0.01
    same = all(torch.equal(start, each.start) for start, each in zip(starts, factors, strict=True))
    assert same == (rank == 0)
    dist.barrier()
    # Not through the destructors: that of the process group, which the DDP model keeps, holds the
    # GIL and joins gloo's thread, which now and then waits for the GIL to free what it gathered.
    os._exit(0)


def test_ddp_of_ranks_that_saw_other_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank_of_two, (str(tmp_path),), nprocs=2)
