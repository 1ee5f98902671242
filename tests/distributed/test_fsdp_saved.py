"""An adapter made in a sharded model: saved, loaded, written into the weights; and who fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoints
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import filet
from alike import assert_same
from filet import FiletConfig
from fsdp_models import all_batches, batches_of, initialised, sharded, whole
from models import case, collate, peft_of
from ranks import errors, run, values


def made() -> Any:
    torch.manual_seed(3)
    return peft_of(case("llama"))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(**collate(case("llama").samples)).logits
    return found


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in all_batches("llama", 2):
        model.eval()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(rank: int, folder: Path, start: str) -> Any:
    model = sharded(made(), (2,))
    parameters = list(model.parameters())
    initialised(model, batches_of("llama", rank, 2), start=start, samples=None)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    train(model)
    expected = logits(model)
    filet.save_as_lora(model, folder / "ours")
    # By torch's full state dict, as accelerate and a Trainer do.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / "theirs", state_dict=state)
    # By torch's sharded checkpoints, into a model that was initialised alike, with other data.
    checkpoints.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "sharded")
    again = sharded(made(), (2,))
    initialised(again, all_batches("llama", 2)[:1], start=start, samples=None)
    state = get_model_state_dict(again)
    checkpoints.load({"model": state}, checkpoint_id=folder / "sharded")
    set_model_state_dict(again, state)
    assert torch.equal(logits(again), expected)
    weights = {}
    if start == "untouched":
        filet.write_residual(model)
        weights = {n: whole(p) for n, p in model.named_parameters() if "base_layer" in n}
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    return {"logits": expected, "weights": weights}


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_what_is_saved_loads(start: str, tmp_path: Path) -> None:
    first, second = values(run(2, saved, tmp_path, start))
    assert_same(first, second, "rank 1")
    expected, weights = first.values()
    case_model = peft_of(case("llama")).unload()
    for way in ("ours", "theirs"):
        model = filet.load(case_model, tmp_path / way)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        case_model = model.unload()
        plain = PeftModel.from_pretrained(case_model, tmp_path / way)
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
        case_model = plain.unload()
    if start == "untouched":
        model = filet.load(case_model, tmp_path / "ours")
        filet.write_residual(model)
        for name, weight in weights.items():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-6)


def alone(rank: int, folder: Path) -> None:
    """The second rank fails within a forward, where the others wait for its rows."""

    def forward(model: Any, batch: Any) -> Any:
        return model(**batch) if rank != 1 else fails()

    def fails() -> None:
        raise KeyError("of one")

    model = sharded(made(), (3,))
    filet.collect_statistics(
        model, batches_of("llama", rank, 3), forward_fn=forward, show_progress_bar=False
    )


def test_a_rank_that_fails_in_a_forward(tmp_path: Path) -> None:
    begin = time.monotonic()
    first, second, third = errors(run(3, alone, tmp_path))
    assert second == "KeyError: 'of one'"
    for said in (first, third):
        assert "Connection" in said or "lost another process" in said
    assert time.monotonic() - begin < 25


def told(rank: int, folder: Path) -> list[Any]:
    """What is raised of failures between the batches, and whether the model is as it was."""
    model = sharded(made(), (2,))
    before = {name: whole(p) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def failing() -> Any:
        yield batches_of("llama", 0, 2)[0]
        if rank:
            raise OSError("no more")

    def with_nan(model: Any, batch: Any) -> Any:
        return model(**batch).loss * (torch.nan if rank else 1)

    def of_all(model: Any, batch: Any) -> Any:
        return model(**batch).logits

    said = []
    calls: list[dict[str, Any]] = [
        {"dataloader": failing()},
        {"forward_fn": with_nan},
        {"forward_fn": of_all},
        {"adapter_name": "other" if rank else "default"},
    ]
    for call in calls:
        arguments = {"dataloader": batches_of("llama", rank, 2), **call}
        try:
            filet.initialize_lora_filet_weights(
                model, config=FiletConfig(samples=None), show_progress_bar=False, **arguments
            )
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), before[name]), name
        assert parameter.requires_grad == flags[name], name
    report = initialised(model, batches_of("llama", rank, 2), samples=None)
    return [said, report]


def test_failures_between_batches_are_told(tmp_path: Path) -> None:
    (first, report), (second, _) = values(run(2, told, tmp_path))
    assert second[0] == "OSError: no more" and first[0] == "OSError: rank 1: no more"
    assert "NaN" in second[1] and first[1] == "FloatingPointError: rank 1: " + second[1][20:]
    assert first[2] == second[2] and first[2].startswith("ValueError: the model returned a Tensor")
    assert first[3].startswith("ValueError: rank 1: adapter_name='other'")
    one = initialised(made(), all_batches("llama", 2), samples=None)
    for name, energies in one["energies"].items():
        torch.testing.assert_close(report["energies"][name], energies, rtol=1e-5, atol=0)
