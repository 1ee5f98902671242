"""Each kind of base against its definition, what is refused, and by what name."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised_bases import kinds, linears, peft_of, quantised
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from filet.model import values as values_module
from filet.model.fingerprint import fingerprints_of
from filet.model.isolation import preserved
from filet.model.targets import checked_targets, find_targets
from filet.model.values import Unreadable, as_trained, values_of

# The 16 values of NF4 (arXiv 2305.14314, appendix E) and of bitsandbytes' FP4, by their codes.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
FP4 += [-value for value in FP4]


def its(model: Any, name: str = "model.layers.0.mlp.up_proj") -> Any:
    return values_of(linears(model)[name], model.config.dtype)


def decoded(module: Any, table: list[float]) -> Tensor:
    """A 4-bit weight in float64, from its bytes and scales."""
    state = module.weight.quant_state
    codes = module.weight.data.flatten()
    nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
    scales = state.absmax.double()
    if state.nested:
        inner = state.state2
        scales = inner.code.double()[state.absmax.long()].view(-1, inner.blocksize)
        scales = (scales * inner.absmax.double()[:, None]).flatten() + state.offset.double()
    found = torch.tensor(table, dtype=torch.float64)[nibbles].view(-1, state.blocksize)
    return (found * scales[: len(found), None]).view(module.out_features, module.in_features)


@pytest.mark.parametrize("kind", kinds("nf4", "fp4"))
def test_four_bits_are_codes_times_scales(kind: str) -> None:
    its_values = its(quantised(kind))
    expected = decoded(its_values.module, NF4 if kind == "nf4" else FP4)
    torch.testing.assert_close(its_values.weight().double(), expected, rtol=1e-6, atol=0)
    assert its_values.kind == f"{kind} (bitsandbytes)"
    assert its_values.shape == (128, 64)


@pytest.mark.parametrize("kind", kinds("nf4 twice"))
def test_scales_that_are_quantised_once_more(kind: str) -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(256, 256, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu")
    assert layer.weight.quant_state.nested
    found = values_of(layer, torch.float32)
    torch.testing.assert_close(found.weight().double(), decoded(layer, NF4), rtol=1e-5, atol=1e-9)
    assert found.kind == "nf4 with double quantisation (bitsandbytes)"


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_four_bits_round_once_to_what_the_layer_computes_in(kind: str) -> None:
    """Of a float16 weight computed with in bfloat16: the forward never sees float16."""
    base = quantised(kind, torch.float16)
    module = linears(base)["model.layers.0.mlp.up_proj"]
    module.compute_dtype = torch.bfloat16
    found = values_of(module, torch.float16).weight()
    assert found.dtype == torch.bfloat16 and module.weight.quant_state.dtype == torch.float16
    x = torch.eye(64, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(found, module(x).T)
    assert torch.equal(found, decoded(module, NF4).float().bfloat16())


@pytest.mark.parametrize("kind", kinds("int8"))
def test_int8_is_codes_times_scales(kind: str) -> None:
    found = its(quantised(kind))
    before = found.weight(), fingerprints_of({"": found})
    module = found.module
    scales = module.weight.SCB.double()
    expected = module.weight.data.double() * scales[:, None] / 127
    torch.testing.assert_close(before[0].double(), expected, rtol=1e-6, atol=0)
    module(torch.ones(1, 64))  # moves the scales into the module's state
    assert module.weight.SCB is None
    assert torch.equal(found.weight(), before[0])
    assert fingerprints_of({"": found}) == before[1]


@pytest.mark.parametrize("kind", kinds("hqq"))
def test_hqq_is_codes_less_zero_times_scales(kind: str) -> None:
    found = its(quantised(kind))
    meta = found.module.meta
    packed = found.module.W_q
    codes = torch.cat([packed >> 4, packed & 15]).double()
    expected = ((codes - meta["zero"].double()) * meta["scale"].double()).reshape(128, 64)
    torch.testing.assert_close(found.weight().double(), expected, rtol=1e-5, atol=1e-7)
    assert (found.kind, found.dtype) == ("4 bits (HQQ)", torch.float32)


@pytest.mark.parametrize("kind", kinds("torchao"))
def test_torchao_is_codes_times_scales(kind: str) -> None:
    found = its(quantised(kind))
    weight = found.module.weight
    expected = weight.qdata.double() * weight.scale.double()
    torch.testing.assert_close(found.weight().double(), expected, rtol=1e-6, atol=0)
    assert found.kind == "Int8Tensor (torchao)"


@pytest.mark.parametrize("kind", kinds())
def test_fingerprints_see_every_bit_and_no_move(kind: str) -> None:
    found = its(quantised(kind))
    before = fingerprints_of({"w": found})["w"]
    assert before == fingerprints_of({"w": its(quantised(kind))})["w"]
    assert before.split(":")[:2] == [found.kind, "128x64"]
    in_4_bits = found.kind.startswith(("nf4", "fp4"))  # its scales: test_quantised_repacked.py
    for part in found.stored():
        flat = part.view(-1).view(torch.uint8)
        if part.dtype == torch.int64 and (in_4_bits or found.kind.startswith("4 bits")):
            continue  # the block size, which is made anew
        if part.dtype == torch.bfloat16 and in_4_bits:
            continue
        flat[-1] ^= 1
        assert fingerprints_of({"w": found})["w"] != before
        flat[-1] ^= 1
    assert fingerprints_of({"w": found})["w"] == before


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", kinds("nf4"))
def test_weights_that_a_cpu_repacked(kind: str, twice: bool) -> None:
    """With AVX512-BF16 a forward in eval mode does what is done here by hand."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    base = quantised("nf4 twice" if twice else kind)
    name = "model.layers.0.mlp.down_proj"  # two scales a row
    module = linears(base)[name]
    whole, codes = its(base, name).weight(), module.weight.data.clone()
    hashed = fingerprints_of({"w": its(base, name)})
    state = copy.copy(module.weight.quant_state)
    module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(codes, state)
    assert not torch.equal(module.weight.data.flatten(), codes.flatten())
    packed = its(base, name).weight()  # its scales in bfloat16
    torch.testing.assert_close(packed, whole, rtol=2**-8, atol=0)
    assert not torch.equal(packed, whole)
    assert fingerprints_of({"w": its(base, name)}) == hashed
    with as_trained(base):
        assert torch.equal(module.weight.data.flatten(), codes.flatten())
        x = torch.eye(128, requires_grad=True)
        product = module(x)
        product.sum().backward()
    assert torch.equal(product.T, packed)
    torch.testing.assert_close(x.grad, packed.sum(0).expand(128, 128))
    assert torch.equal(its(base, name).weight(), packed)
    assert fingerprints_of({"w": its(base, name)}) == hashed


@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_quantised_layers_run_as_in_training(kind: str) -> None:
    """In eval mode bitsandbytes repacks on some CPUs, and rounds inputs of 8 bits on all."""
    peft_model = peft_of(quantised(kind)).eval()
    targets, _ = find_targets(peft_model, "default")
    with preserved(peft_model, "default", targets):
        assert all(target.base.training for target in targets.values())
        assert not any(m.training for m in peft_model.modules() if type(m) is nn.Dropout)
    assert not any(module.training for module in peft_model.modules())


# What is refused.


class Kernel(nn.Module):
    """Stands for one of gptqmodel's: W = scales (codes − 8), stored as (in, out)."""

    SUPPORTS_TRAINING = True
    SUPPORTS_METHODS = (types.SimpleNamespace(value="gptq"),)
    bits, in_features, out_features, bias = 4, 6, 4, None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.arange(24, dtype=torch.int32).view(6, 4) % 16)
        self.register_buffer("scales", torch.rand(6, 4) + 0.5)

    def dequantize_weight(self) -> Tensor:
        return self.scales * (self.qweight - 8)


def kernel(name: str, **attributes: Any) -> Any:
    base = attributes.pop("base", Kernel)
    where = {"__module__": "gptqmodel.nn_modules.qlinear.some", **attributes}
    return type(name, (base,), where)()


def test_gptq() -> None:
    module = kernel("TorchLinear")
    found = values_of(module, torch.float32)
    assert torch.equal(found.weight(), module.dequantize_weight().T)
    assert (found.kind, found.shape, found.quantised) == ("4 bits (GPTQ)", (4, 6), True)
    before = fingerprints_of({"": found})
    module.scales[0, 0] += 1
    assert fingerprints_of({"": found}) != before


class Awq(nn.Module):
    SUPPORTS_TRAINING = True
    SUPPORTS_METHODS = (types.SimpleNamespace(value="awq"),)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            lambda: kernel("MarlinLinear", SUPPORTS_TRAINING=False),
            r"GPTQ's kernel MarlinLinear has no gradient.*GPTQConfig\(backend='auto_trainable'\)",
        ),
        (
            lambda: kernel("AwqMarlinLinear", base=Awq, SUPPORTS_TRAINING=False),
            r"AWQ's kernel AwqMarlinLinear has no gradient.*AwqConfig\(backend='auto_trainable'\)",
        ),
        (
            lambda: kernel("AwqGEMVLinear", base=Awq),
            r"AWQ's kernel AwqGEMVLinear does not give.*AwqConfig\(backend='torch_awq'\)",
        ),
        (
            lambda: kernel("TorchLinear", online_full_had=True),
            "this TorchLinear rotates its input",
        ),
        (
            lambda: type("Mxfp4Linear", (nn.Module,), {})(),
            r"MXFP4 weights: load with Mxfp4Config\(dequantize=True\)",
        ),
        (
            lambda: type("CompressedLinear", (nn.Module,), {"quantization_scheme": object()})(),
            r"compressed-tensors.*CompressedTensorsConfig\(dequantize=True\)",
        ),
        (
            lambda: of_dtype(
                torch.float8_e4m3fn, type("CompressedTensorsFP8Linear", (nn.Linear,), {})
            ),
            r"CompressedTensorsConfig\(dequantize=True\)",
        ),
        (lambda: type("AqlmLinear", (nn.Module,), {})(), "AqlmLinear is not a linear module"),
        (lambda: of_dtype(torch.float8_e4m3fn), "is torch.float8_e4m3fn: quantised as nothing"),
        (lambda: of_dtype(torch.int8), "is torch.int8: quantised as nothing"),
    ],
)
def test_what_is_refused_says_what_to_do(module: Any, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        values_of(module(), torch.bfloat16)


def of_dtype(dtype: torch.dtype, kind: Any = nn.Linear) -> nn.Linear:
    linear: nn.Linear = kind(4, 4)
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    return linear


class Upcast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Rounded(nn.Linear):
    """As a layer that is trained to be quantised rounds its weight, to 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 127
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


class Normed(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[0])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Counted(nn.Linear):
    """Keeps something of what it sees, and draws random numbers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.abs().max() + torch.rand(())
        return super().forward(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_of_its_own_that_is_a_product(bias: bool, device: str) -> None:
    """On the meta device as well, where a streamed model's weights are at first."""
    for kind in (FalconLinear, Upcast, Counted):
        module = kind(6, 4, bias).to(device)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        state = torch.get_rng_state()
        assert values_of(module, torch.float32).weight() is not None
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in module.state_dict().items():
            assert device == "meta" or torch.equal(value, before[name])


def test_conv1d_and_a_class_made_from_it() -> None:
    kind = type("Own", (Conv1D,), {"forward": lambda self, x: Conv1D.forward(self, x)})
    half = type("Half", (Conv1D,), {"forward": lambda self, x: Conv1D.forward(self, x) / 2})
    for module in (Conv1D(4, 6), kind(4, 6)):
        assert values_of(module, torch.float32).shape == (4, 6)
    with pytest.raises(Unreadable, match="the forward of this Half is its own"):
        values_of(half(4, 6), torch.float32)


@pytest.mark.parametrize("kind", [AutoBitLinear, Rounded, Normed])
@pytest.mark.parametrize("size", [6, 64])
def test_a_forward_that_is_no_product_is_refused(kind: Any, size: int) -> None:
    """Energies of its weight would be those of a W that it does not multiply by."""
    with pytest.raises(Unreadable, match=f"the forward of this {kind.__name__} is its own and no"):
        values_of(kind(size, size), torch.float32)


@pytest.mark.parametrize("kind", kinds("torchao"))
def test_torchao_that_quantises_its_input_is_refused(kind: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = nn.Sequential(nn.Linear(64, 64))
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(Unreadable, match=r"quantises its input as well \(act_quant_kwargs\)"):
        values_of(linear[0], torch.float32)


@pytest.mark.parametrize("kind", kinds("torchao"))
def test_torchao_without_a_gradient_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = linears(quantised(kind))["model.layers.0.mlp.up_proj"]
    monkeypatch.setattr(values_module._Torchao, "_gradients", {})

    def linear(x: Tensor, *rest: Any) -> Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(nn.functional, "linear", linear)
    with pytest.raises(Unreadable, match=r"gives no gradient to its input.*no kernel"):
        values_of(module, torch.float32)


@pytest.mark.parametrize("kind", kinds("int8"))
def test_bitsandbytes_that_is_not_quantised_yet_is_refused(kind: str) -> None:
    import bitsandbytes

    for layer in (
        bitsandbytes.nn.Linear4bit(64, 64),
        bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ):
        with pytest.raises(Unreadable, match="is not quantised yet: move it"):
            values_of(layer, torch.float32)
    with pytest.raises(Unreadable, match="has_fp16_weights=True"):
        values_of(bitsandbytes.nn.Linear8bitLt(64, 64), torch.float32)


def test_fp8_blocks() -> None:
    from transformers.integrations import finegrained_fp8

    if not hasattr(finegrained_fp8, "FP8LinearFunction"):
        pytest.skip("this transformers has no gradient of FP8Linear: the next test")
    layer = finegrained_fp8.FP8Linear(96, 160, block_size=(64, 64))
    layer.weight.data.copy_(torch.randn(160, 96))
    layer.weight_scale_inv.data.copy_(torch.rand(3, 2) + 0.5)
    found = values_of(layer, torch.float32)
    scales = layer.weight_scale_inv.double().repeat_interleave(64, 0).repeat_interleave(64, 1)
    expected = layer.weight.double() * scales[:160, :96]
    torch.testing.assert_close(found.weight().double(), expected, rtol=1e-6, atol=0)
    assert (found.kind, found.shape, found.multiplies) == ("float8 blocks", (160, 96), False)
    assert values_of(layer, torch.bfloat16).weight().dtype == torch.bfloat16


def test_fp8_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import finegrained_fp8

    monkeypatch.delattr(finegrained_fp8, "FP8LinearFunction", raising=False)
    layer = finegrained_fp8.FP8Linear(64, 64, block_size=(64, 64))
    with pytest.raises(Unreadable, match=r"FineGrainedFP8Config\(dequantize=True\)"):
        values_of(layer, torch.float32)


def test_layers_left_out_are_named() -> None:
    """One that is refused among others that are not: it keeps PEFT's start, and the report says."""
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "bad": nn.Linear(8, 8)})
    model["bad"].weight = nn.Parameter(
        model["bad"].weight.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["good", "bad"]))
    targets, unsupported = find_targets(peft_model, "default")
    assert list(targets) == ["good"]
    assert list(unsupported) == ["bad"] and "quantised as nothing" in unsupported["bad"]


def test_where_all_are_refused_each_reason_is_said_once() -> None:
    model = nn.ModuleDict({f"layer{number}": of_dtype(torch.float8_e4m3fn) for number in range(9)})
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=list(model)))
    with pytest.raises(ValueError, match="layer0 and 8 more: the weight of this") as refused:
        checked_targets(peft_model, "default")
    assert str(refused.value).count("quantised as nothing") == 1
