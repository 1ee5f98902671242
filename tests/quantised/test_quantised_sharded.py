"""A quantised base under FSDP2: whole on every process, as accelerate leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantised_bases
import torch
from peft import LoraConfig, get_peft_model
from quantised_bases import TARGETS, kinds, quantised

from alike import assert_as_one
from fsdp_models import initialised, sharded
from ranks import run, values


def made(kind: str) -> Any:
    model = quantised(kind)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 64, (2, length), generator=generator) for length in (9, 6, 12)]
    return [{"input_ids": each, "labels": each} for each in ids]


def on_rank(rank: int, folder: Path, kind: str, plain: Path) -> Any:
    quantised_bases.plain_folder = lambda: plain  # type: ignore[assignment]
    model = made(kind)
    kept = {p for p in model.parameters() if type(p).__name__ == "Params4bit"}
    model = sharded(model, (2,), ignored_params=kept)
    assert kept and any(hasattr(p, "full_tensor") for p in model.parameters())
    return initialised(model, batches()[rank::2], samples=None)


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_ranks_equal_one(kind: str, tmp_path: Path) -> None:
    many = values(run(2, on_rank, tmp_path, kind, quantised_bases.plain_folder()))
    assert_as_one(many, initialised(made(kind), batches(), samples=None))
