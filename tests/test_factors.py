"""The factors of an initialised adapter: [A; A0] and [B, −B0], of which one half trains.

The truth is the same adapter as plain PEFT loads it from disk, where both halves are one parameter.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import filet
from adapted import (
    CLOSE,
    Nested,
    assert_same,
    batches,
    effective_weights,
    initialise,
    initialised,
    llama,
    logits,
    lora_layers,
    scaled,
    start,
    train,
    trainable,
    trained,
    wrap,
)
from filet.model.factors import StartedFactor

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 4
READ = "expected load_state_dict, or the saved adapter loaded by PeftModel.from_pretrained"


def factors(model: PeftModel) -> dict[str, StartedFactor]:
    return {name: m for name, m in model.named_modules() if isinstance(m, StartedFactor)}


def starts(model: PeftModel) -> dict[str, Tensor]:
    return {name: factor.start.clone() for name, factor in factors(model).items()}


def factor_of(model: PeftModel, side: str = "lora_A") -> StartedFactor:
    return next(factor for name, factor in factors(model).items() if side in name)


def plain_of(model: PeftModel, folder: Path, **settings: Any) -> PeftModel:
    """The adapter in plain PEFT, over the original base."""
    filet.save_as_lora(model, folder)
    plain: PeftModel = PeftModel.from_pretrained(llama(), str(folder), **settings)
    assert not factors(plain)
    return plain


# What is seen of them.


def test_parameters_are_those_of_the_trained_half() -> None:
    model, plain = initialised(), wrap(llama())
    assert len(factors(model)) == 16
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].shape == parameter.shape
        assert ours[name].requires_grad == parameter.requires_grad
    buffers = {name for name, _ in model.named_buffers()} - {n for n, _ in plain.named_buffers()}
    assert buffers == {f"{name}.start" for name in factors(model)}
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, parameter in ours.items():
        assert model.get_parameter(name) is parameter
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_state_dict_and_peft_see_a_lora_of_twice_the_rank() -> None:
    model, plain = initialised(), wrap(llama(), r=2 * RANK)
    state, theirs = model.state_dict(), plain.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}
    assert not any(value.requires_grad for value in state.values())
    assert model.state_dict(keep_vars=True).keys() == state.keys()
    for name, factor in factors(model).items():
        dim = 0 if "lora_A" in name else 1
        assert (factor.dim, factor.rank) == (dim, RANK)
        assert factor.weight.shape == (factor.out_features, factor.in_features)
        assert torch.equal(factor.weight, torch.cat([factor.trained, factor.start], dim))
        assert torch.equal(factor.weight, state[f"{name}.weight"])
        sign = 1 if dim == 0 else -1  # nothing has trained yet
        assert torch.equal(factor.start, sign * factor.trained)
    for layer in lora_layers(model).values():
        assert (layer.r["default"], layer.lora_alpha["default"]) == (2 * RANK, 16)
        assert layer.scaling["default"] == 2


def test_prints_as_many_trainable_parameters_as_plain_lora(
    capsys: pytest.CaptureFixture[str],
) -> None:
    initialised().print_trainable_parameters()
    wrap(llama()).print_trainable_parameters()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0] == printed[1]


# Training.


def test_an_optimiser_that_was_made_before_trains_them() -> None:
    model = wrap(llama())
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.1)
    modules = dict(model.named_modules())
    initialise(model)
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    before = trainable(model)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    changed = {name for name, value in trainable(model).items() if (value != before[name]).any()}
    assert changed == before.keys() and len(changed) == 16


def test_the_gradient_is_that_of_the_trained_half(tmp_path: Path) -> None:
    model = trained()
    plain = plain_of(model, tmp_path, is_trainable=True)
    for each in (model, plain):
        each(**batches()[0]).loss.backward()
    whole = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        dim = 0 if "lora_A" in name else 1
        expected = whole[name].grad.narrow(dim, 0, RANK)
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7, msg=name)
    assert all(f.start.grad is None and not f.start.requires_grad for f in factors(model).values())


def test_nothing_changes_the_start() -> None:
    model = initialised()
    before = starts(model)
    model.add_adapter("other", copy.deepcopy(wrap(llama()).peft_config["default"]))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.set_requires_grad("default", True)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for batch in itertools.islice(batches(), 2):
        model(**batch).loss.backward()
        optimizer.step()
    assert_same(starts(model), before)
    assert not any(factor.start.requires_grad for factor in factors(model).values())


# Loading into them.


def _peft(model: PeftModel, state: dict[str, Tensor]) -> None:
    set_peft_model_state_dict(model, state)


def _peft_assign(model: PeftModel, state: dict[str, Tensor]) -> None:
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)


def _torch(model: PeftModel, state: dict[str, Tensor]) -> None:
    keys = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
    assert not model.load_state_dict(keys, strict=False).unexpected_keys


def _torch_assign(model: PeftModel, state: dict[str, Tensor]) -> None:
    keys = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
    assert not model.load_state_dict(keys, strict=False, assign=True).unexpected_keys


LOADERS = [_peft, _peft_assign, _torch, _torch_assign]


@pytest.mark.parametrize("other", [False, True], ids=["same start", "another start"])
@pytest.mark.parametrize("load", LOADERS)
def test_a_whole_checkpoint_is_taken_whole(load: Callable[..., None], other: bool) -> None:
    """Also of another initialisation: its own start comes with it."""
    model = start(wrap(llama()), select="max" if other else "min")
    train(model)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    fresh = initialised()
    assert (logits(fresh) - logits(model)).abs().max() > 0.3
    load(fresh, state)
    assert torch.equal(logits(fresh), logits(model))
    assert_same(trainable(fresh), trainable(model))
    assert_same(starts(fresh), starts(model))
    given = {key: value.clone() for key, value in state.items()}
    train(model)
    train(fresh)
    assert_same(trainable(fresh), trainable(model))
    assert_same(starts(fresh), starts(model))
    assert_same({k: v[-RANK:] for k, v in state.items() if "lora_A" in k},
                {k: v[-RANK:] for k, v in given.items() if "lora_A" in k})  # fmt: skip


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_load_adapter_of_peft(low: bool, tmp_path: Path) -> None:
    model = trained()
    filet.save_as_lora(model, tmp_path)
    fresh = initialised()
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True, low_cpu_mem_usage=low)
    assert torch.equal(logits(fresh), logits(model))
    assert_same(trainable(fresh), trainable(model))
    assert_same(starts(fresh), starts(model))


@pytest.mark.parametrize("load", LOADERS)
def test_a_checkpoint_of_the_trained_half_alone_is_refused(load: Callable[..., None]) -> None:
    state = get_peft_model_state_dict(wrap(llama()))
    with pytest.raises(
        RuntimeError,
        match=r"q_proj\.lora_A\.default\.weight: \(4, 32\) in the checkpoint; expected \(8, 32\), "
        r"the trained and the frozen half that FILet's adapters are saved with",
    ):
        load(initialised(), state)


# Reading and writing `weight`.


def _under_no_grad(write: Callable[[nn.Linear], Any]) -> Callable[[nn.Linear], Any]:
    @torch.no_grad()
    def run(linear: nn.Linear) -> None:
        write(linear)

    return run


def _augmented(linear: nn.Linear) -> None:
    weight = linear.weight
    weight += 1


def _item(linear: nn.Linear) -> None:
    linear.weight[0] = 1


def _data(linear: nn.Linear) -> None:
    linear.weight.data = torch.ones(linear.weight.shape)


def _data_item(linear: nn.Linear) -> None:
    linear.weight.data[:2] = 1


def _in_two_steps(linear: nn.Linear) -> None:
    """What was read before another write is not what was written."""
    early = linear.weight.detach()
    linear.weight.add_(1)
    early[0].mul_(3)


def _averaged(linear: nn.Linear) -> None:
    """The average of weights of timm and others."""
    for value in linear.state_dict().values():
        value.mul_(0.5).add_(torch.ones(value.shape), alpha=0.5)


WRITES: dict[str, Callable[[nn.Linear], Any]] = {
    "copy_": lambda linear: linear.weight.copy_(torch.ones(linear.weight.shape)),
    "data.copy_": lambda linear: linear.weight.data.copy_(torch.ones(linear.weight.shape)),
    "detach().mul_": lambda linear: linear.weight.detach().mul_(2),
    "data[...] =": _data_item,
    "data =": _data,
    "+=": _augmented,
    "[...] =": _item,
    "[...].zero_": lambda linear: linear.weight[:2, 1:].zero_(),
    "view": lambda linear: linear.weight.data.view(-1)[3:9].fill_(5),
    "T": lambda linear: linear.weight.T[1].fill_(5),
    "chunk": lambda linear: linear.weight.chunk(2, 1)[1].fill_(5),
    "out=": lambda linear: torch.add(torch.ones(linear.weight.shape), 1, out=linear.weight),
    "_foreach": lambda linear: torch._foreach_mul_([linear.weight], 3.0),
    "nn.init": lambda linear: nn.init.uniform_(linear.weight),
    "nn.init.zeros_": lambda linear: nn.init.zeros_(linear.weight),
    "reset_parameters": lambda linear: linear.reset_parameters(),
    "state_dict": _averaged,
    "state_dict, lerp": lambda linear: torch._foreach_lerp_(
        list(linear.state_dict().values()), [torch.ones(linear.weight.shape)], 0.25
    ),
    "twice": _in_two_steps,
    "= Parameter": lambda linear: setattr(
        linear, "weight", nn.Parameter(torch.ones(linear.weight.shape))
    ),
}


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_the_weight_is_there(write: str, side: str) -> None:
    factor = factor_of(trained(), side)
    plain = nn.Linear(factor.in_features, factor.out_features, bias=False)
    plain.weight.data.copy_(factor.weight.data)
    before = plain.weight.detach().clone()
    for linear in (factor, plain):
        torch.manual_seed(0)
        _under_no_grad(WRITES[write])(linear)
    assert not torch.equal(plain.weight, before)
    assert type(factor) is StartedFactor and torch.equal(factor.weight, plain.weight)
    halves = [factor.trained, factor.start]
    assert torch.equal(torch.cat(halves, factor.dim), plain.weight)
    assert isinstance(halves[0], nn.Parameter) and halves[0].requires_grad


REFUSED: dict[str, Callable[[StartedFactor], Any]] = {
    "requires_grad_": lambda factor: factor.weight.requires_grad_(False),
    "requires_grad =": lambda factor: setattr(factor.weight, "requires_grad", False),
    "grad =": lambda factor: setattr(factor.weight, "grad", torch.ones(factor.weight.shape)),
}


@pytest.mark.parametrize("write", REFUSED)
def test_what_would_be_lost_is_an_error(write: str) -> None:
    model = initialised()
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=r"would be lost; expected it on the parameter, which"):
        REFUSED[write](factor_of(model))
    assert_same(model.state_dict(), before)


def test_a_weight_of_another_shape_is_an_error() -> None:
    model = initialised()
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=r"of shape \(32,\); expected \(8, 32\), both halves"):
        factor_of(model).weight.data = torch.zeros(32)
    assert_same(model.state_dict(), before)


def test_what_is_read_can_be_stored() -> None:
    """As plain tensors, which need nothing of this package."""
    factor = factor_of(trained())
    whole = torch.cat([factor.trained.detach(), factor.start])
    for read in (factor.weight, factor.weight.data, factor.state_dict()["weight"]):
        stored = io.BytesIO()
        torch.save(read, stored)
        stored.seek(0)
        for again in (torch.load(stored, weights_only=True), copy.deepcopy(read)):
            assert type(again) is Tensor and torch.equal(again, whole)
            again.zero_()
    assert torch.equal(factor.weight, whole)


def test_swapping_the_weight_is_an_error() -> None:
    """As PEFT's hot swap does where ranks grow. The message is torch's."""
    factor = factor_of(initialised())
    before = factor.weight.clone()
    with pytest.raises(RuntimeError, match="Cannot swap t1"):
        torch.utils.swap_tensors(factor.weight, torch.zeros(3, 32))
    assert torch.equal(factor.weight, before)


def _dispatched(factor: StartedFactor) -> None:
    """What accelerate does to move a parameter to another device."""
    factor._parameters["weight"] = nn.Parameter(factor.weight.to("cpu", copy=True))


def test_the_whole_in_the_place_of_what_trains_is_an_error() -> None:
    """Twice in it, [A; A0; A0] and [B, −B0, −B0] would fit each other."""
    model = initialised()
    for factor in factors(model).values():
        _dispatched(factor)
    with pytest.raises(
        RuntimeError, match=r"is \(8, 32\); expected the trained half alone, \(4, 32\): .*dispatch"
    ):
        logits(model)
    for factor in factors(model).values():
        with pytest.raises(RuntimeError, match="expected the trained half alone"):
            _ = factor.weight


def test_reading_the_weight() -> None:
    model = trained()
    factor = factor_of(model)
    whole = torch.cat([factor.trained.detach(), factor.start])
    weight = factor.weight
    assert isinstance(weight, Tensor) and weight.requires_grad and not weight.data.requires_grad
    assert (weight.shape, weight.dtype, weight.device) == (whole.shape, whole.dtype, whole.device)
    assert (weight.numel(), len(weight), weight.size(0)) == (whole.numel(), 8, 8)
    x = torch.ones(3, 32)
    reads: list[Tensor] = [
        weight, weight.detach(), weight.data, weight.clone(), weight.cpu(), weight.float(),
        weight.detach().cpu(), weight + 0, 1 * weight, weight.T.T, weight.contiguous(),
    ]  # fmt: skip
    assert all(torch.equal(read, whole) for read in reads)
    assert torch.equal(weight[2:5], whole[2:5])
    assert torch.equal(x @ weight.T, x @ whole.T)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, whole))
    assert (weight.detach().numpy() == whole.numpy()).all()
    assert (weight.data.numpy() == whole.numpy()).all()
    assert torch.equal(torch.zeros_like(weight), torch.zeros_like(whole))
    assert torch.equal(factor(x), x @ whole.T)
    assert torch.equal(weight.norm(), whole.norm())
    weight.clone().zero_()  # nobody's but the reader's
    assert torch.equal(factor.weight, whole)


# Conversions.


def _cast_parameters(model: PeftModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.half()


def _cast_adapter(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


CONVERSIONS: dict[str, Callable[[PeftModel], Any]] = {
    "to float64": lambda model: model.to(torch.float64),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),  # both halves rounded
    "parameters alone": _cast_parameters,
    "adapter alone": _cast_adapter,
    "cpu": lambda model: model.cpu(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_keep_the_function(conversion: str, tmp_path: Path) -> None:
    model = trained()
    plain = plain_of(model, tmp_path)
    for each in (model, plain):
        CONVERSIONS[conversion](each)
    assert torch.equal(logits(model), logits(plain))
    for factor in factors(model).values():
        assert factor.weight.dtype == factor.trained.dtype
    state = model.state_dict()
    assert_same({k: state[k] for k in plain.state_dict()}, plain.state_dict())
    train(model)


def test_devices(device: torch.device, tmp_path: Path) -> None:
    model = trained()
    expected = logits(model)
    moved = copy.deepcopy(model).to(device)
    assert all(factor.start.device.type == device.type for factor in factors(moved).values())
    torch.testing.assert_close(logits(moved), expected, **CLOSE)
    assert_same(starts(moved.cpu()), starts(model))


def test_hooks_that_were_there_before_still_fire() -> None:
    model = wrap(llama())
    calls: list[tuple[str, torch.Size]] = []
    modules = {n: m for n, m in model.named_modules() if n.endswith(("A.default", "B.default"))}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda m, args, n=name: calls.append((n, args[0].shape)))
        module.register_forward_hook(lambda m, args, y, n=name: calls.append((n, y.shape)))
    initialise(model)
    calls.clear()
    logits(model)
    assert [name for name, _ in calls[::2]] == [name for name, _ in calls[1::2]]
    assert {name for name, _ in calls} == modules.keys() and len(calls) == 2 * len(modules)
    assert {shape[-1] for name, shape in calls[1::2] if "lora_A" in name} == {2 * RANK}


def test_compiled_as_one_graph() -> None:
    """Logits and gradients, the backward compiled too."""
    model = wrap(scaled(Nested()), target_modules=["x_fc"], task_type=None)
    initialise(model, loss_reduction="mean")
    train(model)
    model.eval()
    ids = batches()[0]["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, gradients = [], []
    for each in (model, compiled):
        model.zero_grad()
        found.append(each(input_ids=ids).logits)
        found[-1].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert len(gradients[0]) == 2
    assert_same(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_effective_weights_are_the_paper_s() -> None:
    """W + s (B A − B0 A0)."""
    model = trained()
    original = dict(llama().named_parameters())
    for name, weight in effective_weights(model).items():
        layer = lora_layers(model)[name]
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        change = B.trained.double() @ A.trained.double() + B.start.double() @ A.start.double()
        assert change.abs().max() > 1e-2
        expected = original[f"{name}.weight"].double() + 2 * change
        torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-12)
