"""The plain LoRA on disk: what PEFT reloads of it, and what is saved beside it."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraModel, ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import filet
from adapted import (
    CLOSE,
    VOCAB,
    Nested,
    assert_same,
    base_state,
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
from adapter_cases import CASES, FILES, base_of, contents
from filet import FiletConfig
from filet.model.factors import StartedFactor
from initialised import LOUD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_reloads_what_was_trained(
    case: str, tmp_path: Path, device: torch.device
) -> None:
    model = wrap(base_of(case).to(device), **CASES[case])
    if "bias" in CASES[case] and not any("bias" in key for key in get_peft_model_state_dict(model)):
        pytest.skip("this PEFT's own saves lose the biases of lora_only")
    before, ranks = logits(model), {n: dict(layer.r) for n, layer in lora_layers(model).items()}
    report = initialise(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert_same(base_state(model), base_state(base_of(case)))
    train(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.3  # or the comparison below would mean little

    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(base_of(case).to(device), str(tmp_path))
    assert type(plain.base_model) is LoraModel
    assert torch.equal(logits(plain), expected)
    assert_same(effective_weights(plain), effective_weights(model))

    assert type(plain.peft_config["default"]) is LoraConfig
    assert not plain.peft_config["default"].use_rslora
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        rank = ranks[name]["default"]
        assert lora_layers(plain)[name].r["default"] == (2 if name in report.modules else 1) * rank
        key_a, key_b = (f"base_model.model.{name}.{key}.weight" for key in ("lora_A", "lora_B"))
        if name in report.modules:
            assert A.rank == B.rank == rank == report.modules[name].rank
            assert torch.equal(stored[key_a], torch.cat([A.trained, A.start]).cpu())
            assert torch.equal(stored[key_b], torch.cat([B.trained, B.start], 1).cpu())
    # What PEFT writes is the same.
    model.save_pretrained(tmp_path / "peft")
    assert contents(tmp_path) == {
        name: text for name, text in contents(tmp_path / "peft").items() if name in FILES
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["adapter in float32", "adapter in half"])
def test_half_precision(autocast: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrap(llama().to(dtype), autocast_adapter_dtype=autocast)
    before = logits(model)
    initialise(model)
    # Two layers, of logits up to 4; the halves cancel in the adapter's dtype.
    assert (logits(model) - before).abs().max() < 60 * torch.finfo(dtype).eps
    if dtype != torch.float16 or autocast:  # Adam's epsilon is 0 in float16
        train(model)
    filet.save_as_lora(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32 if autocast else dtype}
    plain = PeftModel.from_pretrained(
        llama().to(dtype), str(tmp_path), autocast_adapter_dtype=autocast
    )
    loaded = filet.load(llama().to(dtype), tmp_path)
    for reloaded in (plain, loaded):
        assert torch.equal(logits(reloaded), logits(model))
        assert_same(effective_weights(reloaded), effective_weights(model))
    assert_same(trainable(loaded), trainable(model))
    assert_same(base_state(model), base_state(llama().to(dtype)))


@pytest.mark.parametrize("gathered", [False, True], ids=["state_dict", "named_parameters"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_saved_in_eight_bits(dtype: torch.dtype, gathered: bool, tmp_path: Path) -> None:
    """Whatever dtype the weights are saved in, the file says that half of them is frozen."""
    model = trained(r=3)
    state = dict(model.named_parameters()) if gathered else model.state_dict()
    state = {key: value.detach().to(dtype) for key, value in state.items() if "lora_" in key}
    model.save_pretrained(tmp_path, state_dict=state)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    loaded = filet.load(llama(), tmp_path)
    assert trainable(loaded).keys() == trainable(model).keys()
    for key, value in loaded.state_dict().items():
        if "lora_" in key:
            assert torch.equal(value.float(), model.state_dict()[key].to(dtype).float()), key
    (tmp_path / "filet.json").unlink()
    with pytest.raises(ValueError, match="what half of this adapter is frozen"):
        filet.load(llama(), tmp_path)


def test_adapter_names(tmp_path: Path) -> None:
    model = trained("mine")
    filet.save_as_lora(model, tmp_path, adapter_name="mine")
    for again in (
        PeftModel.from_pretrained(llama(), str(tmp_path)),
        PeftModel.from_pretrained(llama(), str(tmp_path), adapter_name="theirs"),
        filet.load(llama(), tmp_path, adapter_name="loaded"),
    ):
        assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path / "peft")
    assert contents(tmp_path / "peft" / "mine") == {
        name: text for name, text in contents(tmp_path).items() if name in FILES
    }


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_auto_peft_model_finds_the_base(task: str | None, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type=task)
    start(model)
    train(model)
    filet.save_as_lora(model, tmp_path / "adapter")
    auto = AutoPeftModel if task is None else AutoPeftModelForCausalLM
    plain = auto.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "expected"),
    [
        (4, 8, False, 16),
        (3, 16, False, 32),  # 16 / 3 · 6
        (7, 5, False, 10),
        (4, 1.5, False, 3),
        (4, 1.25, False, 2.5),
        (4, 8, True, 32),  # 8 / 2 · 8
        (9, 8, True, 48),  # 8 / 3 · 18
        (8, 8, True, 8 / 8**0.5 * 16),
    ],
)
def test_alpha_is_an_integer_where_it_can_be(
    rank: int, alpha: float, rslora: bool, expected: float, tmp_path: Path
) -> None:
    model = initialised(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj"])
    filet.save_as_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == expected
    assert type(written["lora_alpha"]) is type(expected)
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (2 * rank, {}, {})
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    name = next(iter(lora_layers(model)))
    assert lora_layers(plain)[name].scaling["default"] == pytest.approx(
        lora_layers(model)[name].scaling["default"], rel=1e-15
    )


@pytest.mark.parametrize(
    ("targets", "names"), [(r"fc|block\.x_fc", ["fc", "block.x_fc"]), (["fc"], ["fc", "block.fc"])]
)
def test_names_that_end_alike_are_kept_apart(
    targets: Any, names: list[str], tmp_path: Path
) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3}}
    model = wrap(scaled(Nested()), target_modules=targets, task_type=None, **patterns)
    initialise(model, loss_reduction="mean")
    train(model)
    filet.save_as_lora(model, tmp_path)
    for again in (
        PeftModel.from_pretrained(scaled(Nested()), str(tmp_path)),
        filet.load(scaled(Nested()), tmp_path),
    ):
        assert torch.equal(logits(again), logits(model))
        layers = lora_layers(again)
        assert list(layers) == names
        ranks = [(layer.r["default"], layer.scaling["default"]) for layer in layers.values()]
        assert ranks == [(4, 1.5), (8, 2.0)]


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_layers_are_saved_as_they_are(tied: bool, tmp_path: Path) -> None:
    """PEFT adds an embedding and a head that are targets to what it saves: the base's own bits."""

    def base() -> Any:
        return llama(tie_word_embeddings=tied)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        model = wrap(base(), target_modules=["q_proj", "embed_tokens", "lm_head"])
        initialise(model)
        train(model)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        for name in ("model.embed_tokens", "lm_head"):
            weight = stored[f"base_model.model.{name}.base_layer.weight"]
            assert torch.equal(weight, base().get_submodule(name).weight)
        plain = PeftModel.from_pretrained(base(), str(tmp_path))
        loaded = filet.load(base(), tmp_path)
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(loaded), logits(model))


class Encoder(nn.Module):
    """torch's own attention, whose module PEFT replaces by one that merges and unmerges."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=20, dropout=0.0)
        self.head = nn.Linear(12, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.head(self.layer(self.embedding(input_ids)))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def encoder() -> Any:
    return scaled(Encoder())


def moe() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    return scaled(Qwen3MoeForCausalLM(config))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


ATTENTION = "nn.MultiheadAttention multiplies by its weights itself"


PARTLY: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, str]]] = {
    "attention of torch": (
        encoder,
        {"target_modules": ["self_attn", "linear1", "linear2"], "task_type": None},
        {"layer.self_attn": ATTENTION},
    ),
    "attention of torch, all linear": (
        encoder,
        {"target_modules": "all-linear", "task_type": None},
        {"layer.self_attn.out_proj": "it saw no token"},
    ),
    "experts": (
        moe,
        {"target_modules": ["q_proj", "k_proj"], "target_parameters": EXPERTS},
        {f"model.layers.{i}.mlp.experts{x}": f"{proj} of this Qwen3MoeExperts is a parameter"
         for i in range(2) for x, proj in (("", "down_proj"), (".base_layer", "gate_up_proj"))},
    ),
    "experts and routers, all linear": (
        moe,
        {"target_modules": "all-linear"},
        {f"model.layers.{i}.mlp.{x}": "a parameter (target_parameters), no layer"
         for i in range(2) for x in ("experts", "experts.base_layer", "gate")},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT's own keys
@pytest.mark.parametrize("case", PARTLY)
def test_what_is_not_initialised_is_named_once_and_saved(case: str, tmp_path: Path) -> None:
    make, lora, left = PARTLY[case]
    if "experts" in case and importlib.metadata.version("peft").startswith("0.19."):
        pytest.skip("with today's transformers this PEFT loads no adapter of Qwen3-MoE")
    model = wrap(make(), **lora)
    if "routers" in case and not any(isinstance(m, ParamWrapper) for m in model.modules()):
        pytest.skip("this PEFT leaves parameters out of all-linear")
    before = logits(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        report = filet.initialize_lora_filet_weights(
            model,
            batches(),
            FiletConfig(**LOUD, samples=None, loss_reduction="mean"),
            show_progress_bar=False,
        )
    (said,) = [str(w.message) for w in found if "keep PEFT's default" in str(w.message)]
    assert report.left_default.keys() == left.keys() and report.modules
    for name, reason in left.items():
        assert reason in report.left_default[name]
    assert all(said.count(f"{name} (") == 1 for name in list(report.left_default)[:5])
    started = {n for n, m in model.named_modules() if isinstance(m, StartedFactor)}
    assert started == {
        f"base_model.model.{name}.{side}.default"
        for name in report.modules
        for side in ("lora_A", "lora_B")
    }
    assert_same(base_state(model), base_state(wrap(make(), **lora)))
    torch.testing.assert_close(logits(model), before, **CLOSE)
    train(model)
    assert (logits(model) - before).abs().max() > 0.3
    filet.save_as_lora(model, tmp_path)
    # PEFT merges into torch's attention for every forward, and unmerges: that rounds.
    tolerance = CLOSE if "layer.self_attn" in left else {"rtol": 0, "atol": 0}
    for again in (PeftModel.from_pretrained(make(), str(tmp_path)), filet.load(make(), tmp_path)):
        torch.testing.assert_close(logits(again), logits(model), **tolerance)


def test_what_is_no_lora_on_its_base_is_not_saved(tmp_path: Path) -> None:
    model = initialised()
    model.add_adapter("olora", LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"))
    with pytest.raises(
        ValueError, match=r"adapter 'olora' has init_lora_weights='olora', by which PEFT changes"
    ):
        filet.save_as_lora(model, tmp_path / "new", adapter_name="olora")
    model.delete_adapter("olora")
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter_name='other'; expected one of \['default', "):
        filet.save_as_lora(model, tmp_path / "new", adapter_name="other")
    with pytest.raises(TypeError, match="expected the PeftModel"):
        filet.save_as_lora(llama(), tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "both")
    assert [path.parent.name for path in (tmp_path / "both").rglob("filet.json")] == ["both"]
