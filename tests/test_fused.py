"""The model's own operations by fused kernels: which ones, and what comes out."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

import filet.model.fused
from filet.model.fused import fused
from filet_kernels.elementwise.rotary import rotary_reference
from models import assert_energies, case, energies_of, llama, loader, peft_of

Change = Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Any]
NORMS, MLPS, TURNS = {"RMSNorm"}, {"MLP"}, {"rotary"}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every device; where there is no kernel, by the same formula in plain torch."""
    monkeypatch.setattr(filet.model.fused, "FUSES_ON", {"cpu", "cuda"})


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


class ChangedNorm(PlainNorm):
    """A norm of which something else is made, by an attribute of the instance."""

    def __init__(self, change: Change = lambda norm, x, run: run(x)) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self, x, super().forward)


class OtherEpsilon(PlainNorm):
    """It has two, and uses the one that is not looked at."""

    variance_epsilon = 1e-5


class ByPlace(GemmaNorm):
    """Over the channels of (B, n), which lie elsewhere in what has more dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        v = x.float() * torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight * v.to(x.dtype)


class Gated(nn.Module):
    def __init__(self, act: str | nn.Module = "silu", change: Change | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=True) for _ in range(2))
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = ACT2FN[act] if isinstance(act, str) else act
        self.change = change

    def gated(self, x: Tensor) -> Tensor:
        product: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return product

    def forward(self, x: Tensor) -> Any:
        if self.change is not None:
            return self.change(self, x, lambda x: self.down_proj(self.gated(x)))
        return self.down_proj(self.gated(x))


class Swish(nn.Module):
    """x σ(slope x), times ``after`` where it is called."""

    def __init__(self, slope: float = 1.0, after: float = 1.0) -> None:
        super().__init__()
        self.slope, self.after = slope, after

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.slope == 1 else x * torch.sigmoid(self.slope * x)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x)
        return y if self.after == 1 else y * self.after


class Learned(Swish):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones((), device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * self.beta)


def half_detached(x: Tensor) -> Tensor:
    """The same number, and half of its gradient."""
    return (x + x.detach()) / 2


CHANGES: dict[str, Change] = {
    "scaled": lambda m, x, run: run(x) * 1.5,
    "scaled input": lambda m, x, run: run(x * 1.5),
    "in a tuple": lambda m, x, run: (run(x),),
    "in float64": lambda m, x, run: run(x).double(),
    "cut off": lambda m, x, run: run(x.clamp(-4096, 4096)),
    "in place": lambda m, x, run: x.copy_(run(x)),
    "detached": lambda m, x, run: run(x.detach()),
    "half detached": lambda m, x, run: run(half_detached(x)),
    "kept": lambda m, x, run: setattr(m, "change_seen", run(x)) or m.change_seen,
    "in training": lambda m, x, run: F.dropout(run(x), 0.5, m.training),
}


def twice(m: Any, x: Tensor, run: Any) -> Tensor:
    return m.down_proj(m.down_proj(m.gated(x)))  # type: ignore[no-any-return]


def not_down(m: Any, x: Tensor, run: Any) -> Tensor:
    return m.gated(x)  # type: ignore[no-any-return]


def past_the_hooks(m: Any, x: Tensor, run: Any) -> Tensor:
    return m.down_proj(m.act_fn(m.gate_proj.forward(x)) * m.up_proj(x))  # type: ignore[no-any-return]


def limited(m: Any, x: Tensor, run: Any) -> Tensor:
    gate, up = m.gate_proj(x).clamp(max=7), m.up_proj(x).clamp(-7, 7)
    return m.down_proj(m.act_fn(gate) * up)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("module", "taken"),
    [
        (PlainNorm(), True),
        (GemmaNorm(), False),
        (OtherEpsilon(), False),
        (ByPlace(), False),
        (Gated(), True),
        (Gated("swish"), True),
        (Gated("gelu_pytorch_tanh"), False),
        (Gated("relu"), False),
        (Gated(Swish()), True),
        (Gated(Swish(slope=1.702)), False),
        (Gated(Swish(after=0.5)), False),
        (Gated(Learned("cpu")), True),
        (Gated(Learned("meta")), False),
        (Gated(change=twice), False),
        (Gated(change=not_down), False),
        (Gated(change=past_the_hooks), False),
        (Gated(change=limited), False),
        (ChangedNorm(), True),
        *(
            pytest.param(ChangedNorm(how), False, id=f"norm {name}")
            for name, how in CHANGES.items()
        ),
        *(
            pytest.param(Gated(change=how), False, id=f"MLP {name}")
            for name, how in CHANGES.items()
        ),
        (ChangedNorm(CHANGES["in training"]).eval(), True),
        (Gated(change=CHANGES["in training"]).eval(), True),
        (PlainNorm().double(), False),
        (nn.LayerNorm(8), False),
    ],
)
def test_what_it_does_counts_not_its_name(
    module: nn.Module, taken: bool, dtype: torch.dtype
) -> None:
    module = copy.deepcopy(module).to(dtype) if _is_float32(module) else copy.deepcopy(module)
    module.requires_grad_(False)
    before = torch.random.get_rng_state(), {**vars(module)}
    with fused(nn.ModuleList([module])):
        assert ("forward" in vars(module)) == taken
    assert vars(module) == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[0])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_of_torchs_own(dtype: torch.dtype) -> None:
    """Rounded once; in float32 that is the same."""
    module = nn.RMSNorm(8, eps=1e-6, dtype=dtype).requires_grad_(False)
    with fused(nn.ModuleList([module])):
        assert "forward" not in vars(module)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda change: ChangedNorm(change or (lambda m, x, run: run(x))),
        lambda change: Gated(change=change),
        lambda change: Gated(Swish(slope=3.0) if change else Swish()),
    ],
)
def test_every_instance_counts(make: Any, turned: bool, device: torch.device) -> None:
    """Of one class, and not the same: each does in the pass what it does by itself."""
    torch.manual_seed(0)
    modules = nn.ModuleList([make(None), make(CHANGES["scaled"]), make(None)])
    if turned:
        modules = nn.ModuleList([modules[1], modules[0], make(CHANGES["scaled"])])
    for parameter in modules.to(device).requires_grad_(False).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 8, device=device)
    expected = [module(x) for module in modules]
    with fused(modules):
        assert ["forward" in vars(module) for module in modules] == [
            not turned, turned, not turned,
        ]  # fmt: skip
        found = [module(x) for module in modules]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_what_was_shown_is_the_same_for_all() -> None:
    """Whoever writes what he is given, or draws numbers, changes nothing for those after him."""

    def spoils(m: Any, x: Tensor, run: Any) -> Tensor:
        with torch.no_grad():
            x.add_(torch.rand_like(x))
            m._parameters["weight"].zero_()
        return run(x)  # type: ignore[no-any-return]

    norms = [ChangedNorm(), ChangedNorm(spoils), ChangedNorm()]
    before = torch.random.get_rng_state()
    for _ in range(2):
        with fused(nn.ModuleList(norms).requires_grad_(False)):
            assert ["forward" in vars(norm) for norm in norms] == [True, False, True]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("everywhere")
def test_a_call_of_its_own(device: torch.device) -> None:
    """What is replaced is the forward: who calls it, and what is made of it, stays."""

    class Called(PlainNorm):
        def __call__(self, x: Tensor) -> Tensor:
            return 3 * super().__call__(x)

    class Sidestepped(PlainNorm):
        def __call__(self, x: Tensor) -> Tensor:
            return x + 1

    x = torch.randn(4, 8, device=device)
    for module in (Called(), Sidestepped()):
        nn.init.normal_(module.requires_grad_(False).to(device).weight)
        expected = module(x)
        with fused(nn.ModuleList([module])):
            assert "forward" in vars(module)
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_other_dtypes_than_was_shown(device: torch.device) -> None:
    """Gates in float32 of a bfloat16 module: what its activation does with them is its own."""

    class Upcast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    class Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x) if x.dtype == torch.bfloat16 else x

    module = Gated(Only())
    module.gate_proj, module.up_proj = Upcast(8, 12), Upcast(8, 12)
    module.to(device, torch.bfloat16).requires_grad_(False)
    module.down_proj.float()
    x = torch.randn(4, 8, device=device, dtype=torch.bfloat16)
    expected = module(x)
    with fused(nn.ModuleList([module])):
        assert torch.equal(module(x), expected)


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
    monkeypatch.setattr(filet.collect.unrounded, "HANDS_ON", {"cpu", "cuda"})
    c = case("llama")
    calls: list[str] = []
    for name in ("rms_norm", "swiglu"):
        function = getattr(filet.model.fused, name)

        def count(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(filet.model.fused, name, count)
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
@pytest.mark.parametrize("who", ["a part", "forward_pre", "forward", "full_backward"])
def test_who_watches_an_activation_otherwise(who: str) -> None:
    """A part of it, or the modules of all models: the MLP stays, and nobody sees what is tried."""
    m = llama(layers=1).requires_grad_(False)
    mlp = m.model.layers[0].mlp
    seen: list[str] = []
    if who == "a part":
        handle = mlp.act_fn.register_forward_hook(lambda *_: seen.append("a"))
        mlp.act_fn = nn.Sequential(mlp.act_fn)
    else:
        watch = getattr(nn.modules.module, f"register_module_{who}_hook")
        handle = watch(lambda *_: seen.append("a"))
    try:
        with fused(m):
            assert len(replaced(m)) == 2 + 1 and "forward" not in vars(mlp) and not seen
    finally:
        handle.remove()
    with fused(m):
        assert len(replaced(m)) == 2 + 1 + 1


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (turned, True),
        (lambda q, k, cos, sin, unsqueeze_dim=1: turned(q, k, cos, sin), True),
        (lambda q, k, cos, sin: turned(q, k, cos[:1], sin[:1]), False),  # the first sample's
        (lambda q, k, cos, sin: turned(q, k[:, :1].expand_as(q), cos, sin), False),
        (lambda q, k, cos, sin: turned(q[:1].expand_as(q), k, cos, sin), False),
        (lambda q, k, cos, sin: turned(q, half_detached(k), cos, sin), False),
        (lambda q, k, cos, sin: turned(q, k, -cos, sin), False),
        (lambda q, k, cos, sin: list(turned(q, k, cos, sin)), False),
        (lambda q, k, cos: turned(q, k, cos, cos), False),
        (None, False),
    ],
)
def test_which_position_embeddings(
    function: Any, taken: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Found beside the class of any module, tried whoever wrote them."""
    source: Any = types.ModuleType("positions")
    source.apply_rotary_pos_emb = function
    monkeypatch.setitem(sys.modules, "positions", source)
    module = type("Turns", (nn.Linear,), {"__module__": "positions"})(2, 2).to(device)
    with fused(module.requires_grad_(False)):
        assert (source.apply_rotary_pos_emb is not function) == taken
    assert source.apply_rotary_pos_emb is function


@pytest.mark.usefixtures("everywhere")
def test_learned_positions_get_their_gradient(device: torch.device) -> None:
    m = llama(layers=1).to(device).requires_grad_(False)
    source = sys.modules[type(m).__module__]
    q, k = (torch.randn(2, heads, 5, 8, device=device) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, device=device, requires_grad=True) for _ in range(2))

    def gradients() -> tuple[Tensor, ...]:
        q_turned, k_turned = source.apply_rotary_pos_emb(q, k, cos, sin)
        return torch.autograd.grad(q_turned.square().sum() + k_turned.sum(), (cos, sin))

    expected, before = gradients(), source.apply_rotary_pos_emb
    with fused(m):
        assert source.apply_rotary_pos_emb is not before
        for one, two in zip(gradients(), expected, strict=True):
            assert torch.equal(one, two)


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
        function = getattr(filet.model.fused, name)

        def count(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(filet.model.fused, name, count)
    peft_model = peft_of(c, device, dtype)
    found = energies_of(peft_model, loader(c.samples))
    batches = calls.count("swiglu") / 2
    assert batches >= 2 and calls.count("rms_norm") == batches * 5
    assert calls.count("rotary") == batches * 2
    assert not replaced(peft_model)
    monkeypatch.setattr(filet.model.fused, "FUSES_ON", set())
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
        monkeypatch.setattr(filet.model.fused, name, None)
    with fused(m):
        found = torch.compile(m, backend="eager", fullgraph=True)(ids).logits
        with pytest.raises(TypeError):
            m(ids)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
