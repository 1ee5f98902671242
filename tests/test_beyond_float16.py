"""y and h as scaled float16: rows beyond its range come in later, by a smaller scale, exactly.

What a GPU does, on every device. The truth is the pass that forms y and h once more in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import filet
from filet import FiletConfig, Statistics
from filet.collect import unrounded
from filet.collect.hooks import MomentHooks
from models import Case, assert_energies, case, energies_of, llama, loader, peft_of

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# bfloat16 of x, g and of the model's arithmetic is the same in both; of the y and h that are handed
# on the model's own rounding may differ in its last bit, once a layer.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    on_both = {"cpu", "cuda"}
    yield lambda on: monkeypatch.setattr(unrounded, "HANDS_ON", on_both if on else set())


@pytest.fixture
def second_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many moments were found to lack rows, batch by batch."""
    found: list[int] = []
    plain = MomentHooks.add_left_out

    def watch(self: Any, runs: int | None = None) -> None:
        for run in self.unrounded.runs[:runs]:
            lacking = sum(bool(rows[0].any()) for rows in run.left_out.values())
            found.extend([lacking] if lacking else [])
        plain(self, runs)

    monkeypatch.setattr(MomentHooks, "add_left_out", watch)
    return found


def base(peft_model: Any, name: str) -> nn.Module:
    module: nn.Module = peft_model.base_model.model.get_submodule(name).get_base_layer()
    return module


def faint_at_first(peft_model: Any, names: list[str], factor: float) -> None:
    """In a batch of one sample, the first, these layers get inputs that much smaller."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = args
        return (x * factor if x.shape[0] == 1 else x,)

    for name in names:
        base(peft_model, name).register_forward_pre_hook(before)


def uneven(c: Case) -> list[dict[str, Tensor]]:
    """A first batch of one sample, then several at a time."""
    return [*loader(c.samples[:1], 1), *loader(c.samples[1:], 4)]


@DTYPES
@pytest.mark.parametrize("factor", [2.0**-30, 0.0])
def test_inputs_that_grow(
    factor: float, dtype: torch.dtype, device: torch.device, handed_on: Any, second_runs: list[int]
) -> None:
    """Two layers in the space of y: a first batch of 2⁻³⁰ of the others, or of nothing at all.

    By the scale of the first batch what follows is infinite in float16, or lost. The layers before
    get gradients that grow as well, in the space of h.
    """
    c = case("llama")
    names = [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]

    def run() -> dict[str, Tensor]:
        peft_model = peft_of(c, device, dtype)
        faint_at_first(peft_model, names, factor)
        return energies_of(peft_model, uneven(c), share_inputs=False)

    handed_on(False)
    expected = run()
    assert not second_runs
    handed_on(True)
    found = run()
    # The second batch, and the third, which went through before the answer; not the fourth.
    assert second_runs == [6, 6]
    assert_energies(found, expected, CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("how", ["loss", "labels"])
def test_gradients_that_grow(
    how: str, dtype: torch.dtype, device: torch.device, handed_on: Any, second_runs: list[int]
) -> None:
    """The space of h, after a first batch of a loss of next to nothing, or without any label."""
    if how == "loss" and dtype == torch.float16:
        pytest.skip("the loss scale of a float16 model is that of its first batch")
    c = case("llama")
    batches = uneven(c)
    if how == "labels":
        batches[0]["labels"].fill_(-100)

    def forward_fn(model: Any, batch: Any) -> Any:
        loss = model(**batch).loss
        return loss * 2.0**-30 if how == "loss" and len(batch["labels"]) == 1 else loss

    def run() -> dict[str, Tensor]:
        loud = {"loss_reduction": "mean"} if how == "loss" else {}
        return energies_of(
            peft_of(c, device, dtype), batches, forward_fn if how == "loss" else None, **loud
        )

    handed_on(False)
    expected = run()
    handed_on(True)
    assert_energies(run(), expected, CLOSE[dtype])
    assert second_runs == [4, 4]  # gate and up of two blocks


def test_a_layer_that_is_called_three_times(
    device: torch.device, handed_on: Any, second_runs: list[int]
) -> None:
    """Each call's own rows are left out, and come in again."""
    c = case("albert")
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"

    def run() -> dict[str, Tensor]:
        peft_model = peft_of(c, device, torch.bfloat16)
        faint_at_first(peft_model, [name], 2.0**-30)
        return energies_of(peft_model, uneven(c), share_inputs=False)

    handed_on(False)
    expected = run()
    handed_on(True)
    assert_energies(run(), expected, CLOSE[torch.bfloat16])
    assert second_runs


def test_padding_and_counts(device: torch.device, handed_on: Any) -> None:
    """Rows of padding stay out the second time as well, and no row counts twice."""
    c = case("llama")

    def run() -> Statistics:
        peft_model = peft_of(c, device, torch.bfloat16)
        faint_at_first(peft_model, [n for n in c.targets if "down" in n], 2.0**-30)
        return filet.collect_statistics(
            peft_model, uneven(c), FiletConfig(samples=None), show_progress_bar=False
        )

    handed_on(False)
    expected = run()
    handed_on(True)
    found = run()
    tokens = sum(len(sample["input_ids"]) for sample in c.samples)
    for name, moments in found.moments.items():
        assert int(moments.input.count) == int(expected.moments[name].input.count) == tokens
        for mine, theirs in ((moments.input, expected.moments[name].input),):
            off = (mine.sum.diagonal() - theirs.sum.diagonal()).abs() / theirs.sum.diagonal()
            assert off.max() < 1e-2, name


def test_bitwise_the_same_twice(device: torch.device, handed_on: Any) -> None:
    c = case("llama")
    handed_on(True)

    def run() -> Statistics:
        peft_model = peft_of(c, device, torch.bfloat16)
        faint_at_first(peft_model, [n for n in c.targets if "down" in n], 2.0**-30)
        return filet.collect_statistics(
            peft_model, uneven(c), FiletConfig(samples=None), show_progress_bar=False
        )

    first, second = run(), run()
    for name, moments in first.moments.items():
        for side in ("input", "output"):
            one, other = getattr(moments, side), getattr(second.moments[name], side)
            assert torch.equal(one.sum.tril(), other.sum.tril()), f"{name} {side}"


def test_the_last_batch_too(device: torch.device, handed_on: Any, second_runs: list[int]) -> None:
    """The answer of a GPU comes a batch later; after the last one it is waited for."""
    c = case("llama")

    def run() -> dict[str, Tensor]:
        peft_model = peft_of(c, device, torch.bfloat16)
        faint_at_first(peft_model, ["model.layers.0.mlp.down_proj"], 2.0**-30)
        batches = [*loader(c.samples[:1], 1), *loader(c.samples[1:5], 4)]
        return energies_of(peft_model, batches, share_inputs=False)

    handed_on(False)
    expected = run()
    handed_on(True)
    assert_energies(run(), expected, CLOSE[torch.bfloat16])
    assert second_runs == [3]  # that layer, and the h of gate and up before it


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_still_named(
    bad: float, device: torch.device, handed_on: Any
) -> None:
    c = case("llama")
    handed_on(True)
    peft_model = peft_of(c, device, torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    faint_at_first(peft_model, [name], 2.0**-30)

    def spoil(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        if x.shape[0] > 1:
            x[0, 0, 0] = bad
        return (x,)

    base(peft_model, name).register_forward_pre_hook(spoil)
    with pytest.raises(FloatingPointError, match=rf"^{name}: its output .* batch 1 "):
        energies_of(peft_model, uneven(c))


def test_no_second_run_where_all_is_well(
    device: torch.device, handed_on: Any, second_runs: list[int]
) -> None:
    c = case("llama")
    handed_on(True)
    calls: list[int] = []
    peft_model = peft_of(c, device, torch.bfloat16)
    base(peft_model, c.targets[0]).register_forward_hook(lambda *_: calls.append(0))
    energies_of(peft_model, loader(c.samples))
    assert not second_runs and len(calls) == 3  # batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_by_block(
    dtype: torch.dtype, device: torch.device, handed_on: Any, second_runs: list[int], tmp_path: Path
) -> None:
    """At the end of a block its batches go through again, with the gradients that they had."""
    c = case("llama")
    copy.deepcopy(c.model).to(dtype).save_pretrained(tmp_path / "model")
    batches = uneven(c)
    batches[0]["labels"].fill_(-100)

    def run(engine: Any) -> dict[str, Tensor]:
        report = filet.initialize_folder(
            tmp_path / "model",
            batches,
            tmp_path / engine,
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            engine=engine,
            device=device,
            overwrite=True,
            show_progress_bar=False,
        )
        return {name: module.energies for name, module in report.modules.items()}

    handed_on(False)
    expected = run("blockwise")
    assert not second_runs
    handed_on(True)
    assert_energies(run("blockwise"), expected, CLOSE[dtype])
    assert second_runs == [2, 2, 2] * 2  # gate and up of every block, of all batches with labels


# The forward that gradient checkpointing runs once more.


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_recomputed_is_what_the_loss_saw(
    reentrant: bool, device: torch.device, handed_on: Any
) -> None:
    """Bit by bit: a layer in the space of y may not take another product the second time."""
    handed_on(True)
    model = llama(layers=1, hidden_size=256, intermediate_size=640)
    targets = [f"model.layers.0.{n}" for n in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")]
    peft_model = peft_of(Case(copy.deepcopy(model), [], targets), device, torch.bfloat16)
    peft_model.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    outputs: dict[str, list[Tensor]] = {}
    for name in targets:
        base(peft_model, name).register_forward_hook(
            lambda module, args, output, name=name: outputs.setdefault(name, []).append(
                output.detach().clone()
            )
        )
    energies_of(peft_model, loader(case("llama").samples, 12))
    assert len(outputs["model.layers.0.self_attn.k_proj"]) == 2
    for name, all_runs in outputs.items():
        for again in all_runs[1:]:
            differ = int((all_runs[0] != again).sum())
            assert not differ, f"{name}: {differ} of {again.numel()} elements differ"
