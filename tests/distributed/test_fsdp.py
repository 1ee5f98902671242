"""A model that FSDP2 has sharded, beside the whole model in one process with the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import filet
import filet.collect.unrounded
import filet.loss.text
from alike import assert_as_one, assert_same
from filet import FiletConfig
from fsdp_models import all_batches, batches_of, cast, initialised, outcome, sharded, whole
from models import case, collate, peft_of, truth
from ranks import run, values

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
HALF = MixedPrecisionPolicy(param_dtype=torch.float16)


def made(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(3)
    return peft_of(case(kind), **more)


def rounded(dtype: torch.dtype) -> Any:
    """A model in float32 of numbers that ``dtype`` has."""
    return cast(cast(made(), dtype), torch.float32)


def on_rank(rank: int, folder: Path, size: int, config: Any) -> Any:
    model = sharded(made(), (size,))
    found = initialised(model, batches_of("llama", rank, size), **config)
    return found, losses(model, [step[rank : rank + 1] for step in STEPS]) if size == 2 else None


# Of every step, a batch of each rank's, with as many labels.
STEPS = [[collate([case("llama").samples[i]]) for i in pair] for pair in ((0, 8), (3, 9), (7, 1))]


def losses(model: Any, steps: list[list[Any]]) -> list[float]:
    """Of each step of a training, whose gradient is the mean over its batches."""
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for batches in steps:
        total = sum(model(**batch).loss for batch in batches) / len(batches)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach()))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_ranks_equal_one(size: int, start: str, tmp_path: Path) -> None:
    config = {"start": start, "samples": None}
    many = values(run(size, on_rank, tmp_path, size, config))
    model = made()
    one = initialised(model, all_batches("llama", size), **config)
    assert_as_one([found for found, _ in many], one)
    expected = truth("llama")  # by float64, which knows nothing of the library
    for name, energies in many[0][0]["energies"].items():
        torch.testing.assert_close(energies, expected[name], rtol=1e-4, atol=0)
    if size == 2:  # and it trains as the whole model does
        mean = torch.tensor([losses for _, losses in many]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(losses(model, STEPS)), rtol=1e-5, atol=0)


def several(rank: int, folder: Path) -> dict[str, Any]:
    """What two processes have by other ways; each beside one process in the tests below."""
    mine, found = batches_of("llama", rank, 2), {}
    model = sharded(rounded(torch.bfloat16), (2,), mp_policy=BFLOAT16)
    found["bfloat16"] = initialised(model, mine, samples=None)
    model = sharded(rounded(torch.float16), (2,), mp_policy=HALF)
    found["float16"] = initialised(model, mine, samples=None)
    filet.collect.unrounded.HANDS_ON = {"cpu"}
    model = faint_at_first(sharded(rounded(torch.bfloat16), (2,), mp_policy=BFLOAT16))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    found["handed on"] = initialised(model, [*uneven(rank), *mine], samples=None)
    found["calls"] = len(calls)
    filet.collect.unrounded.HANDS_ON = {"cuda"}
    model = made()
    model.base_model.model.gradient_checkpointing_enable()
    found["checkpointed"] = initialised(sharded(model, (2,)), mine, samples=None)
    found["sampled"] = initialised(sharded(made(), (2,)), mine, samples=None, fisher="sampled")
    # Over two processes whole, each with all rows of every weight.
    found["replicated"] = initialised(sharded(made(), (2, 1)), mine, samples=None)
    # Conv1D's weights are turned: of W each process has columns.
    turned = sharded(made("gpt2"), (2,))
    found["turned"] = initialised(turned, batches_of("gpt2", rank, 2), samples=None)
    return found


def faint_at_first(model: Any) -> Any:
    """In a batch of one sample, the first, a layer in the space of y gets far smaller inputs."""
    base = model.base_model.model.get_submodule("model.layers.1.self_attn.k_proj").get_base_layer()
    base.register_forward_pre_hook(
        lambda module, args: (args[0] * (2.0**-30 if args[0].shape[0] == 1 else 1),)
    )
    return model


def uneven(rank: int) -> list[Any]:
    """The second rank has rows beyond float16 one batch later than the first, or not at all."""
    return [collate(case("llama").samples[rank : rank + 1])] * (1 + rank)


def on_rank_of_four(rank: int, folder: Path) -> Any:
    """Two copies of the model, each divided between two processes: every row is there twice."""
    model = sharded(made(), (2, 2))
    shapes = {name: p.to_local().shape for name, p in model.named_parameters()}
    found = initialised(model, batches_of("llama", rank, 4), start="untouched", samples=None)
    filet.save_as_lora(model, folder / "adapter")
    filet.write_residual(model)
    weights = {n: whole(p) for n, p in model.named_parameters() if "base_layer" in n}
    return found, weights, shapes


def test_copies_of_a_sharded_model(tmp_path: Path) -> None:
    many = values(run(4, on_rank_of_four, tmp_path))
    model = made()
    one = initialised(model, all_batches("llama", 4), start="untouched", samples=None)
    assert_as_one([found for found, *_ in many], one)
    for _, weights, _ in many:
        assert_same(weights, many[0][1], "residual")
    for name, parameter in case("llama").model.named_parameters():
        rows = [
            shape[0]
            for *_, shapes in many
            for n, shape in shapes.items()
            if n.replace(".base_layer", "").endswith(f".{name}")
        ]
        assert sum(rows) == 2 * len(parameter) and max(rows) < len(parameter), name
    filet.write_residual(model)
    for name, weight in many[0][1].items():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=1e-5)
    loaded = filet.load(made().unload(), tmp_path / "adapter")
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, many[0][0]["factors"][name]), name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return values(run(2, several, tmp_path_factory.mktemp("ranks")))


def assert_close(many: list[Any], one: Any, rtol: float) -> None:
    assert_same(many[1], many[0], "rank 1")
    for key in ("left", "counts", "tokens", "shared"):
        assert many[0][key] == one[key], key
    for name, energies in one["energies"].items():
        torch.testing.assert_close(many[0]["energies"][name], energies, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(dtype: torch.dtype, two: list[Any]) -> None:
    """As of a model whose weights are in 16 bits, which is what is multiplied."""
    one = initialised(cast(rounded(dtype), dtype), all_batches("llama", 2), samples=None)
    assert_close([each[str(dtype)[6:]] for each in two], one, 1e-3)
    exact = initialised(rounded(dtype), all_batches("llama", 2), samples=None)
    off = [
        (one["energies"][name] / energies - 1).abs().max()
        for name, energies in exact["energies"].items()
    ]
    assert max(off) > 1e-3  # in float32 they would be others


def test_rows_beyond_float16_of_one_rank(two: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch goes through once more: on all ranks, whoever has those rows."""
    batches = [batch for rank in (0, 1) for batch in uneven(rank)] + all_batches("llama", 2)
    model = faint_at_first(rounded(torch.bfloat16))
    monkeypatch.setattr("filet.collect.unrounded.HANDS_ON", {"cpu"})
    one = initialised(cast(model, torch.bfloat16), batches, samples=None)
    assert_close([each["handed on"] for each in two], one, 1e-3)
    most = max(len([*uneven(rank), *batches_of("llama", rank, 2)]) for rank in (0, 1))
    assert two[0]["calls"] == two[1]["calls"] > most


@pytest.mark.parametrize("way", ["checkpointed", "sampled", "replicated"])
def test_other_ways(way: str, two: list[Any]) -> None:
    config = {"fisher": "sampled"} if way == "sampled" else {}
    one = initialised(made(), all_batches("llama", 2), samples=None, **config)
    assert_as_one([each[way] for each in two], one)


def test_weights_of_which_each_has_columns(two: list[Any]) -> None:
    one = initialised(made("gpt2"), all_batches("gpt2", 2), samples=None)
    assert_as_one([each["turned"] for each in two], one)


def kept(rank: int, folder: Path) -> Any:
    """Three ranks, one without a sample of the task, another one without any to keep."""
    config = FiletConfig(samples=None, passes=2)
    model = sharded(made(), (3,))
    others = batches_of("llama", 2 - rank, 3)
    mine = batches_of("llama", rank, 3)
    statistics = filet.collect_statistics(model, mine, config, keep=others, show_progress_bar=False)
    statistics.save(folder / "statistics.safetensors")
    filet.loss.text.SELF_TOKENS = 9
    by_itself = initialised(model, mine, keep="self", samples=70)
    taken = outcome(filet.apply_statistics(model, statistics, config), model)
    loaded = filet.Statistics.load(folder / "statistics.safetensors")
    again = sharded(made(), (3,))
    read = outcome(filet.apply_statistics(again, loaded, config), again)
    return taken, read, by_itself


def test_data_to_keep_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = values(run(3, kept, tmp_path, launched=True))
    batches = all_batches("llama", 3)
    one = initialised(made(), batches, keep=batches, samples=None, passes=2)
    assert_as_one([taken for taken, _, _ in many], one)
    assert_as_one([read for _, read, _ in many], one)
    file = filet.Statistics.load(tmp_path / "statistics.safetensors")
    model = made()
    assert_as_one([outcome(filet.apply_statistics(model, file), model)], one)
    monkeypatch.setattr("filet.loss.text.SELF_TOKENS", 9)
    one = initialised(made(), batches, keep="self", samples=70)
    assert_as_one([by_itself for _, _, by_itself in many], one)
