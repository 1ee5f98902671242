"""The loss of a model that FSDP2 has sharded: by the chunks that a whole model's takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import filet.loss.chunked
from alike import assert_as_one, assert_same
from fsdp_models import all_batches, batches_of, cast, initialised, sharded
from models import case, llama, peft_of
from ranks import run, values

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
CAST = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
FLOAT32 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)


def made(dtype: torch.dtype = torch.float32, task: str | None = None, **config: Any) -> Any:
    """Of numbers that the dtype has; of the class that PEFT has for the task."""
    c = case("llama")
    if config:
        torch.manual_seed(5)
        c = dataclasses.replace(c, model=llama(**config))
    torch.manual_seed(3)
    return cast(cast(peft_of(c, task_type=task), dtype), torch.float32)


def with_head_alone(model: Any) -> Any:
    fully_shard(model.base_model.model.lm_head, mesh=_mesh())
    return sharded(model, (2,))


def with_head_and_norm(model: Any) -> Any:
    inner = model.base_model.model
    fully_shard([inner.model.norm, inner.lm_head], mesh=_mesh())
    return sharded(model, (2,))


def in_two_units(model: Any) -> Any:
    """The outermost has nothing of its own, and the head's gives up its weights after a forward."""
    for each in (*model.base_model.model.model.layers, model.base_model.model):
        fully_shard(each, mesh=_mesh())
    return fully_shard(model, mesh=_mesh())


def with_output_in_float32(model: Any) -> Any:
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=_mesh(), mp_policy=BFLOAT16)
    return fully_shard(model, mesh=_mesh(), mp_policy=FLOAT32, reshard_after_forward=True)


def whole_alone(model: Any) -> Any:
    """One unit, all of whose weights are gathered at once."""
    return fully_shard(model, mesh=_mesh(), reshard_after_forward=True)


def _mesh() -> Any:
    return torch.distributed.device_mesh.init_device_mesh("cpu", (2,))


# What shards the model, and whether its head is replaced.
WAYS: dict[str, tuple[Callable[[], Any], bool]] = {
    "plain": (lambda: sharded(made(), (2,)), True),
    "given up after a forward": (
        lambda: sharded(made(), (2,), reshard_after_forward=True),
        True,
    ),
    "in two units": (lambda: in_two_units(made()), True),
    "one unit": (lambda: whole_alone(made()), True),
    "tied": (lambda: sharded(made(tie_word_embeddings=True), (2,)), True),
    "bfloat16": (lambda: sharded(made(torch.bfloat16), (2,), mp_policy=BFLOAT16), True),
    "output in bfloat16": (lambda: sharded(made(torch.bfloat16), (2,), mp_policy=CAST), True),
    "output in bfloat16, for a task": (
        lambda: sharded(made(torch.bfloat16, "CAUSAL_LM"), (2,), mp_policy=CAST),
        True,
    ),
    "output in float32": (lambda: with_output_in_float32(made(torch.bfloat16)), True),
    "the head alone": (lambda: with_head_alone(made()), False),
    "the head and the norm": (lambda: with_head_and_norm(made()), False),
}


def counting() -> Callable[[], int]:
    """Tells, when called, how many losses went by chunks since it last was."""
    calls: list[float] = []
    plain = filet.loss.chunked.ChunkedLoss.backward

    def backward(self: Any, scale: float, *more: Any, **named: Any) -> None:
        calls.append(scale)
        plain(self, scale, *more, **named)

    def count() -> int:
        found = len(calls)
        calls.clear()
        return found

    filet.loss.chunked.ChunkedLoss.backward = backward  # type: ignore[method-assign]
    return count


def every_way(rank: int, folder: Path) -> dict[str, Any]:
    filet.loss.chunked.CHUNK_BYTES, filet.loss.chunked.CHUNK_ROWS = 8 * 64 * 4, 8
    count = counting()
    found = {}
    for way, (shard, _) in WAYS.items():
        model = shard()
        mine = initialised(model, batches_of("llama", rank, 2), samples=None)
        model(**batches_of("llama", rank, 2)[0]).loss.backward()  # and it trains
        found[way] = (mine, count())
    # A batch of the first process takes the model's own way, at first and after.
    for way, place in {"odd at first": 0, "odd later": 1}.items():
        batches = batches_of("llama", rank, 2)
        if rank == 0:
            batches[place] = {**batches[place], "logits_to_keep": 0}
        found[way] = (initialised(sharded(made(), (2,)), batches, samples=None), count())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return values(run(2, every_way, tmp_path_factory.mktemp("ranks")))


def whole(way: str) -> Any:
    """A model that is not sharded, of the dtype that is multiplied in."""
    if "bfloat16" in way or "float32" in way:
        return cast(made(torch.bfloat16), torch.bfloat16)
    return made(**({"tie_word_embeddings": True} if way == "tied" else {}))


@pytest.mark.parametrize("way", WAYS)
def test_energies(way: str, two: list[Any]) -> None:
    """Those of one process; in 16 bits too, where another loss would round otherwise."""
    (first, chunks), (second, others) = (each[way] for each in two)
    assert (chunks, others) == ((3, 3) if WAYS[way][1] else (0, 0))
    one = initialised(whole(way), all_batches("llama", 2), samples=None)
    if whole(way).dtype == torch.float32:
        assert_as_one([first, second], one)
        return
    assert_same(second, first, "rank 1")
    for name, energies in one["energies"].items():
        torch.testing.assert_close(first["energies"][name], energies, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("way", "chunks"), [("odd at first", (2, 2)), ("odd later", (2, 3))])
def test_a_batch_of_one_process_goes_another_way(
    way: str, chunks: tuple[int, int], two: list[Any]
) -> None:
    """Until it is known what the model does, all take the same way; from then on each its own."""
    assert tuple(each[way][1] for each in two) == chunks
    one = initialised(made(), all_batches("llama", 2), samples=None)
    assert_as_one([each[way][0] for each in two], one)
