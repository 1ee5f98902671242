"""What the other tests here see of gloo, on GPUs by NCCL: several processes beside one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import assert_equal, assert_same_adapter, initialize, model_folder
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import filet
from alike import assert_as_one, assert_same
from filet import FiletConfig
from fsdp_models import all_batches, batches_of, cast, initialised, outcome, sharded, whole
from models import case, peft_of
from ranks import run, values

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.usefixtures("no_picture"),
]


def made() -> Any:
    torch.manual_seed(3)
    return peft_of(case("llama")).to("cuda")


def on_cpu(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "factors": {n: value.cpu() for n, value in found["factors"].items()}}


def in_parallel(rank: int, folder: Path, size: int, config: Any) -> Any:
    model = made()
    report = filet.initialize_lora_filet_weights(
        DistributedDataParallel(model, device_ids=[rank]), batches_of("llama", rank, size),
        FiletConfig(**config), show_progress_bar=False,
    )  # fmt: skip
    return on_cpu(outcome(report, model))


def with_keep(rank: int, folder: Path, size: int, config: Any) -> Any:
    mine = batches_of("llama", rank, size), batches_of("llama", size - 1 - rank, size)
    return on_cpu(initialised(made(), *mine, **config))


def divided(rank: int, folder: Path, size: int, config: Any) -> Any:
    return on_cpu(
        initialised(sharded(made(), (size,), "cuda"), batches_of("llama", rank, size), **config)
    )


@pytest.mark.parametrize("how", [in_parallel, with_keep, divided])
@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_ranks_equal_one(how: Any, start: str, tmp_path: Path) -> None:
    for size in {2, min(torch.cuda.device_count(), 3)}:
        config = {"start": start, "samples": None}
        many = values(run(size, how, tmp_path, size, config, gpus=True))
        batches = all_batches("llama", size)
        keep = batches if how is with_keep else None
        # With data to keep they are eigenvalues and vectors, which amplify the rounding of sums.
        rtol = 1e-5 if keep is None else 1e-4
        assert_as_one(many, on_cpu(initialised(made(), batches, keep, **config)), rtol)


def half(rank: int, folder: Path) -> Any:
    """Of weights in float32, gathered in bfloat16; the moments by our kernels."""
    model = cast(cast(made(), torch.bfloat16), torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = initialised(
        sharded(model, (2,), "cuda", mp_policy=policy), batches_of("llama", rank, 2), samples=None
    )
    step = model(**{k: v.cuda() for k, v in batches_of("llama", rank, 2)[0].items()}).loss
    step.backward()
    gradients = {n: whole(p.grad).cpu() for n, p in model.named_parameters() if p.requires_grad}
    return on_cpu(found), gradients


def test_mixed_precision(tmp_path: Path) -> None:
    (one, gradients), (two, others) = values(run(2, half, tmp_path, gpus=True))
    assert_same(two, one, "rank 1")
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool(g.any()) for name, g in gradients.items() if "lora_B" in name)
    full = initialised(cast(made(), torch.bfloat16), all_batches("llama", 2), samples=None)
    for name, energies in full["energies"].items():
        # The same products of the same numbers; 1e-3 as by gloo (test_fsdp.py).
        torch.testing.assert_close(one["energies"][name], energies, rtol=1e-3, atol=0)


def by_blocks(rank: int, folder: Path, model: Path, config: FiletConfig) -> Any:
    mine = batches_of("llama", rank, 2)
    how: dict[str, Any] = {"device": torch.device("cuda", rank), "config": config, "batches": mine}
    return initialize(model, folder / "many", **how)


def test_block_by_block(tmp_path: Path) -> None:
    folder, config = model_folder("llama"), FiletConfig(samples=None, start="untouched")
    many = values(run(2, by_blocks, tmp_path, folder, config, gpus=True))
    how: dict[str, Any] = {"device": torch.device("cuda"), "config": config}
    one = initialize(folder, tmp_path / "one", batches=all_batches("llama", 2), **how)
    for report in many:
        assert_equal(report, one, 2e-5)
    assert_same_adapter(tmp_path / "many", tmp_path / "one", 2e-5)
    assert filet.FiletReport.load(tmp_path / "many").samples == 12
