"""The model's own operations by fused kernels: which ones, and what comes out."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

import filet.fused
from filet.fused import fused
from models import assert_energies, case, energies_of, llama, loader, peft_of

NORMS, MLPS, TURNS = {"RMSNorm"}, {"MLP"}, {"rotary"}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every device; where there is no kernel, by the same formula in plain torch."""
    monkeypatch.setattr(filet.fused, "FUSES_ON", {"cpu", "cuda"})


def model(name: str, dtype: torch.dtype, device: torch.device, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    built = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built.to(device, dtype).eval().requires_grad_(False)


def opt(dtype: torch.dtype, device: torch.device) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def replaced(m: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in m.named_modules() if "forward" in vars(module)}


def run(m: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embedding's output."""
    ids = torch.arange(20, device=next(m.parameters()).device).view(2, 10)
    embedded = m.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    output = m(inputs_embeds=embedded, labels=ids)
    output.loss.backward()
    return output.logits.detach(), embedded.grad


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Llama", NORMS | MLPS | TURNS),
        ("Mistral", NORMS | MLPS | TURNS),
        ("Qwen3", NORMS | MLPS | TURNS),  # norms of queries and keys, too
        ("Granite", NORMS | MLPS | TURNS),
        ("Phi3", NORMS | TURNS),  # gate and up are one product
        ("Olmo2", MLPS | TURNS),  # rounds its norms once; in float32 that is the same
        ("Cohere", MLPS),
        ("Gemma2", TURNS),  # another norm, another gate
        ("OPT", set()),
    ],
)
def test_which_modules_and_the_same_model(
    name: str, kinds: set[str], dtype: torch.dtype, device: torch.device
) -> None:
    m = opt(dtype, device) if name == "OPT" else model(name, dtype, device)
    expected = run(m)
    before = vars(sys.modules[type(m).__module__]).get("apply_rotary_pos_emb")
    with fused(m):
        found_kinds = {
            kind
            for module in replaced(m).values()
            for kind in ("RMSNorm", "MLP")
            if type(module).__name__.endswith(kind)
        }
        count = len(replaced(m))
        source = vars(sys.modules[type(m).__module__])
        if source.get("apply_rotary_pos_emb") is not before:
            found_kinds.add("rotary")
        found = run(m)
    if name == "Olmo2" and dtype == torch.float32:
        kinds = kinds | NORMS
    assert found_kinds == kinds
    blocks = {"Llama": 2 * 3 + 1, "Qwen3": 2 * 5 + 1, "Phi3": 2 * 2 + 1, "Cohere": 2}
    assert name not in blocks or count == blocks[name]
    assert not replaced(m) and source.get("apply_rotary_pos_emb") is before
    if device.type == "cpu":
        assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 16 * torch.finfo(dtype).eps * b.abs().max()


class GemmaNorm(nn.Module):
    """(1 + w) x r: what Llama's norm is not, though its parts are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        v = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (v * (1 + self.weight.float())).to(x.dtype)


class PlainNorm(GemmaNorm):
    def forward(self, x: Tensor) -> Tensor:
        v = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * v.to(x.dtype)


class Gated(nn.Module):
    def __init__(self, act: str = "silu", factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=True) for _ in range(2))
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = ACT2FN[act]
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        output: Tensor = self.down_proj(gated * self.factor if self.factor != 1 else gated)
        return output


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("module", "taken"),
    [
        (PlainNorm(), True),
        (GemmaNorm(), False),
        (Gated(), True),
        (Gated("swish"), True),
        (Gated("gelu_pytorch_tanh"), False),
        (Gated("relu"), False),
        (Gated(factor=0.5), False),
        (PlainNorm().double(), False),
        (nn.RMSNorm(8, eps=1e-6), False),  # a kernel of torch's own, rounded once
        (nn.LayerNorm(8), False),
    ],
)
def test_what_it_does_counts_not_its_name(module: nn.Module, taken: bool) -> None:
    module = copy.deepcopy(module).bfloat16() if _is_float32(module) else module
    module.requires_grad_(False)
    before = torch.random.get_rng_state()
    with fused(nn.Sequential(module)):
        assert ("forward" in vars(module)) == taken
    assert "forward" not in vars(module)
    assert torch.equal(torch.random.get_rng_state(), before)


def _is_float32(module: nn.Module) -> bool:
    return next(module.parameters()).dtype == torch.float32


@pytest.mark.usefixtures("everywhere")
def test_a_forward_of_its_own_is_left_alone() -> None:
    m = llama(layers=1).requires_grad_(False)
    norm = m.model.norm
    own = norm.forward = lambda x: x * 2  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), fused(m):
        assert norm.forward is own and len(replaced(m)) == 1 + 2 + 1
        raise KeyboardInterrupt
    assert list(replaced(m)) == ["model.norm"]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_behind_the_hooks_of_a_device_map(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay and are called; fused operations and y and h as without them, to the bit."""
    monkeypatch.setattr(filet.walk, "HANDS_ON", {"cpu", "cuda"})
    c = case("llama")
    calls: list[str] = []
    for name in ("rms_norm", "swiglu"):
        function = getattr(filet.fused, name)

        def count(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(filet.fused, name, count)
    expected = energies_of(peft_of(c, device, dtype), loader(c.samples))
    direct, calls[:] = list(calls), []
    mapped = dispatch_model(copy.deepcopy(c.model).to(dtype), {"": str(device)}, force_hooks=True)
    for module in mapped.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(device, io_same_device=True))
    peft_model = get_peft_model(mapped, LoraConfig(r=4, target_modules=c.targets))
    before = {m: dict(vars(m)) for m in mapped.modules()}
    found = energies_of(peft_model, loader(c.samples))
    assert calls == direct != []
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for module, attributes in before.items():
        for name in ("forward", "_old_forward", "_hf_hook"):
            assert vars(module).get(name) is attributes.get(name)


@pytest.mark.usefixtures("everywhere")
def test_hooks_still_run_and_the_meta_device_is_fine() -> None:
    m = llama(layers=1).requires_grad_(False)
    seen: list[str] = []
    handles = [
        m.model.norm.register_forward_hook(lambda *_: seen.append("norm")),
        m.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append("down")),
    ]
    run(m)
    plainly, seen[:] = list(seen), []
    with fused(m):
        run(m)
    assert plainly == ["down", "norm"] and seen == plainly
    # The activation would no longer be called by itself: who watches it gets the MLP as it is.
    handles.append(m.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append("a")))
    with fused(m):
        assert len(replaced(m)) == 2 + 1 and seen == plainly
    for handle in handles:
        handle.remove()
    with torch.device("meta"):
        empty = llama(layers=1).requires_grad_(False)
    with fused(empty):
        assert len(replaced(empty)) == 2 + 1 + 1
        assert run(empty)[0].is_meta


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pass_uses_them(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies against those of the model as it is; only the backward's roundings differ.

    On a GPU outputs can be a rounding apart as well, 2⁻⁸, which such small models magnify.
    """
    c = case("llama")
    calls: list[str] = []
    for name in ("rms_norm", "swiglu", "rotary"):
        function = getattr(filet.fused, name)

        def count(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(filet.fused, name, count)
    peft_model = peft_of(c, device, dtype)
    found = energies_of(peft_model, loader(c.samples))
    batches = calls.count("swiglu") / 2
    assert batches >= 2 and calls.count("rms_norm") == batches * 5
    assert calls.count("rotary") == batches * 2
    assert not replaced(peft_model)
    monkeypatch.setattr(filet.fused, "FUSES_ON", set())
    calls.clear()
    expected = energies_of(peft_of(c, device, dtype), loader(c.samples))
    assert not calls
    assert_energies(found, expected, 1e-5 if dtype == torch.float32 else 6e-2)


@pytest.mark.usefixtures("everywhere")
def test_torch_compile_runs_modules_as_they_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = llama(layers=1).to(device).eval().requires_grad_(False)
    ids = torch.arange(8, device=device).view(1, 8)
    expected = m(ids).logits
    try:
        torch.compile(m, backend="eager", fullgraph=True)(ids)
    except torch._dynamo.exc.Unsupported as error:  # 2.8 and transformers 5.24, for one
        pytest.skip(f"torch {torch.__version__} cannot trace this transformers: {error}")
    torch.compiler.reset()
    for name in ("rms_norm", "swiglu", "rotary"):
        monkeypatch.setattr(filet.fused, name, None)
    with fused(m):
        found = torch.compile(m, backend="eager", fullgraph=True)(ids).logits
        with pytest.raises(TypeError):
            m(ids)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
