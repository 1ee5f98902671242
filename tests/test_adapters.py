"""An initialised model: its state in memory, and its ways to disk and back.

The truth is :func:`effective_weights`, W + Σ s B A over the active adapters in float64, and logits
of the model that was trained. Factors are made large (scaling="singular": B A = W V̂ V̂ᵀ), so that a
forgotten A0, B0 or a wrong scaling changes the logits by their own size.
"""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import filet
from filet import FiletConfig, adapters
from filet.adapters import twin_name

VOCAB = 31
BASES = ["residual", "untouched"]
TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]
# Two float32 models of two layers with logits of order one, computed in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
TWIN = twin_name("default")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for one another on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Models, data, steps.


def llama(kind: type[nn.Module] = LlamaForCausalLM, **config: Any) -> Any:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        **config,
    }
    return _scaled(kind(LlamaConfig(**settings)))


def gpt2() -> Any:
    config = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return _scaled(GPT2LMHeadModel(config))


def _scaled(model: nn.Module) -> nn.Module:
    """The same weights at each call: activations of order one, biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.copy_(float("bias" not in name) + 0.1 * noise)
    return model


class Nested(nn.Module):
    """A module "fc" and another whose name ends in ".fc", and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.fc = nn.Linear(12, 12)
        self.block = nn.ModuleDict({"fc": nn.Linear(12, 12), "x_fc": nn.Linear(12, 12)})
        self.head = nn.Linear(12, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        x = torch.tanh(self.fc(self.embedding(input_ids)))
        logits = self.head(torch.tanh(self.block["x_fc"](torch.tanh(self.block["fc"](x)))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def batches(device: torch.device | str = "cpu", classes: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        ids = torch.randint(1, VOCAB, (4, 7), generator=generator).to(device)
        labels = ids[:, 0] % classes if classes else ids
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def wrap(model: nn.Module, name: str = "default", **lora: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    autocast = lora.pop("autocast_adapter_dtype", True)
    config = LoraConfig(**{**settings, **lora})
    return get_peft_model(model, config, name, autocast_adapter_dtype=autocast)


def initialise(model: PeftModel, base: str, name: str = "default", **config: Any) -> Any:
    settings = {"base": base, "scaling": "singular", "samples": None, **config}
    device = next(model.parameters()).device
    classes = 2 if isinstance(model.get_base_model(), LlamaForSequenceClassification) else 0
    with warnings.catch_warnings():  # that an embedding or an inactive adapter is left alone
        warnings.simplefilter("ignore")
        return filet.initialize_lora_filet_weights(
            model,
            batches(device, classes),
            FiletConfig(**settings),  # type: ignore[arg-type]
            adapter_name=name,
            show_progress_bar=False,
        )


def train(model: nn.Module, steps: int = 2) -> None:
    """AdamW on whatever asks for a gradient, from a fresh optimiser."""
    device = next(model.parameters()).device
    classes = 2 if isinstance(model.get_base_model(), LlamaForSequenceClassification) else 0  # type: ignore[operator]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for batch in itertools.islice(itertools.cycle(batches(device, classes)), steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> Tensor:
    model.eval()
    batch = batches(next(model.parameters()).device)[0]
    batch.pop("labels")
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found.float().cpu()


def initialised(base: str = "residual", **lora: Any) -> PeftModel:
    model = wrap(llama(), **lora)
    initialise(model, base)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name: module
        for name, module in model.get_base_model().named_modules()  # type: ignore[operator]
        if isinstance(module, LoraLayer) and module.lora_A
    }


def weight_of(module: nn.Module) -> Tensor:
    """W (m, n) in float64."""
    weight = module.weight.detach().double().cpu()  # type: ignore[union-attr,operator]
    return weight.T if isinstance(module, Conv1D) else weight


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + Σ s B A over the active adapters, of every LoRA layer over a linear module."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[name] = weight_of(layer.get_base_layer())
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                A, B = (weight_of(getattr(layer, key)[adapter]) for key in ("lora_A", "lora_B"))
                found[name] = found[name] + layer.scaling[adapter] * (B @ A)
    return found


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own tensors under the names that they had before PEFT, copied."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return {
        key.replace(".base_layer", "").replace(".original_module", ""): value.clone().cpu()
        for key, value in model.state_dict().items()
        if ".lora_" not in key and ".modules_to_save." not in key
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Bitwise, unless a tolerance says otherwise."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key],
            value,
            **(tolerance or {"rtol": 0, "atol": 0}),
            msg=lambda m, k=key: f"{k}: {m}",
        )


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What is trained: A, B, their biases, modules to save."""
    return {
        key: value.detach().clone().cpu()
        for key, value in model.named_parameters()
        if f".{name}" in key
    }


# The plain LoRA on disk.

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no task": {"task_type": None},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 7},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.gate_proj": 5},
    },
    "patterns rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.gate_proj": 5},
    },
    "modules to save": {"modules_to_save": ["lm_head"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "rslora embedding": {
        "use_rslora": True,
        "r": 6,
        "target_modules": [*TARGETS, "embed_tokens"],
    },
    "rslora lora_bias": {"use_rslora": True, "r": 6, "lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "classifier": {"task_type": "SEQ_CLS"},
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d rslora": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True},
}


def base_of(case: str) -> Any:
    if case.startswith("conv1d"):
        return gpt2()
    if case == "classifier":
        return llama(LlamaForSequenceClassification, num_labels=2)
    return llama(attention_bias="bias" in case, mlp_bias="bias" in case)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_plain_peft_reloads_what_was_trained(
    case: str, base: str, tmp_path: Path, device: torch.device
) -> None:
    model = wrap(base_of(case).to(device), **CASES[case])
    if "bias" in CASES[case] and not any("bias" in key for key in get_peft_model_state_dict(model)):
        pytest.skip("this PEFT's own saves lose the biases of lora_only")
    before = logits(model)
    initialise(model, base)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    train(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.3  # or the comparison below would mean little

    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(base_of(case).to(device), str(tmp_path))
    assert type(plain.base_model) is LoraModel
    torch.testing.assert_close(logits(plain), expected, **CLOSE)
    assert_same(effective_weights(plain), effective_weights(model), rtol=0, atol=2e-6)

    config = plain.peft_config["default"]
    assert not config.use_rslora
    initialised_layers = model._filet_states["default"].layers
    for name, layer in lora_layers(model).items():
        twice = 2 if name in initialised_layers else 1
        assert lora_layers(plain)[name].r["default"] == twice * layer.r["default"]
    assert initialised_layers.keys() == lora_layers(plain).keys()
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, start in initialised_layers.items():
        layer, rank = lora_layers(model)[name], len(start.A0)
        A, B = (stored[f"base_model.model.{name}.{key}.weight"] for key in ("lora_A", "lora_B"))
        assert torch.equal(A, torch.cat([layer.lora_A["default"].weight.cpu(), start.A0.cpu()]))
        assert torch.equal(B[:, :rank], layer.lora_B["default"].weight.cpu())
        assert torch.equal(B[:, rank:], -start.B0.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_differs_by_the_rounding_of_w_alone(
    base: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = wrap(llama().to(dtype))
    initialise(model, base)
    train(model)
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(llama().to(dtype), str(tmp_path))
    reloaded = effective_weights(plain)
    for name, weight in effective_weights(model).items():
        # Half a unit in the last place of W_res, twice for the binade boundary, and the float32
        # in which s B A is formed; untouched, nothing is rounded.
        written = weight_of(lora_layers(model)[name].get_base_layer()).abs()
        unit = torch.finfo(dtype).eps / 2 if base == "residual" else 0.0
        assert ((reloaded[name] - weight).abs() <= unit * written + 1e-6).all(), name
    change = (logits(plain) - logits(model)).abs().max()
    assert change < 60 * torch.finfo(dtype).eps, change


@pytest.mark.parametrize("base", BASES)
def test_adapters_in_bf16_are_stored_to_the_bit(base: str, tmp_path: Path) -> None:
    model = wrap(llama().bfloat16(), autocast_adapter_dtype=False)
    initialise(model, base)
    train(model)
    filet.save_as_lora(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    plain = PeftModel.from_pretrained(llama().bfloat16(), str(tmp_path))
    reloaded = effective_weights(plain)
    for name, weight in effective_weights(model).items():
        written = weight_of(lora_layers(model)[name].get_base_layer()).abs()
        assert ((reloaded[name] - weight).abs() <= 2**-8 * written + 1e-6).all(), name
    loaded = filet.load(llama().bfloat16(), tmp_path)
    assert_same(adapter_tensors(loaded), adapter_tensors(model))


@pytest.mark.parametrize("base", BASES)
def test_adapter_names(base: str, tmp_path: Path) -> None:
    model = wrap(llama(), name="mine")
    initialise(model, base, name="mine")
    train(model)
    filet.save_as_lora(model, tmp_path, adapter_name="mine")
    for plain in (
        PeftModel.from_pretrained(llama(), str(tmp_path)),
        PeftModel.from_pretrained(llama(), str(tmp_path), adapter_name="theirs"),
        filet.load(llama(), tmp_path, adapter_name="loaded"),
    ):
        torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_auto_peft_model_finds_the_base(task: str | None, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type=task)
    initialise(model, "residual")
    train(model)
    filet.save_as_lora(model, tmp_path / "adapter")
    auto = AutoPeftModel if task is None else AutoPeftModelForCausalLM
    plain = auto.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


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


@pytest.mark.parametrize("base", BASES)
def test_names_that_end_alike_are_kept_apart(base: str, tmp_path: Path) -> None:
    def plain_model() -> nn.Module:
        return _scaled(Nested())

    targets = {"target_modules": r"fc|block\.x_fc", "task_type": None}
    model = wrap(plain_model(), rank_pattern={"^fc": 2}, alpha_pattern={"^fc": 3}, **targets)
    initialise(model, base, loss_reduction="mean")
    train(model)
    assert list(lora_layers(model)) == ["fc", "block.x_fc"]  # the twin brought no others
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(plain_model(), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)

    patterns = {"rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3}}
    both = wrap(plain_model(), target_modules=["fc"], task_type=None, **patterns)
    initialise(both, base, loss_reduction="mean")
    filet.save_as_lora(both, tmp_path)
    plain = PeftModel.from_pretrained(plain_model(), str(tmp_path))
    layers = {
        name: (m.r["default"], m.scaling["default"]) for name, m in lora_layers(plain).items()
    }
    assert layers == {"fc": (4, 1.5), "block.fc": (8, 2.0)}


def test_only_initialised_adapters_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'default' was not initialised by FILet"):
        filet.save_as_lora(wrap(llama()), tmp_path / "new")
    with pytest.raises(ValueError, match=r"adapter_name='other'; expected one of \['default'\]"):
        filet.save_as_lora(initialised(), tmp_path / "new", adapter_name="other")
    with pytest.raises(TypeError, match="expected the PeftModel"):
        filet.save_as_lora(llama(), tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# Files.


def full_disk_at(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th file to be written meets a full disk, when half of it is there."""
    calls = itertools.count()
    save_file, write_text = adapters.save_file, Path.write_text

    def failing(write: Callable[..., Any], at: Callable[..., Path]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == k:
                at(*args).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return run

    monkeypatch.setattr(adapters, "save_file", failing(save_file, lambda tensors, path, **_: path))
    monkeypatch.setattr(Path, "write_text", failing(write_text, lambda path, *_: path))


@pytest.mark.parametrize("k", range(3))
def test_full_disk_leaves_the_files_that_were_there(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialised()
    filet.save_as_lora(model, tmp_path / "old")
    before = logits(model)
    files = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "filet.json"]
    train(model)
    with monkeypatch.context() as patch:
        full_disk_at(k, patch)
        with pytest.raises(OSError, match="No space left"):
            filet.save_as_lora(model, tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == files
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "old"))
    torch.testing.assert_close(logits(plain), before, **CLOSE)
    with monkeypatch.context() as patch:
        full_disk_at(k, patch)
        with pytest.raises(OSError, match="No space left"):
            filet.save_as_lora(model, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# Loading to go on.

RESUMED = ["plain", "rslora", "patterns rslora", "modules to save", "bias all"]
RESUMED += ["rslora embedding", "rslora lora_bias", "classifier", "conv1d"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", RESUMED)
def test_load_goes_on_at_rank_r(case: str, base: str, tmp_path: Path) -> None:
    model = wrap(base_of(case), **CASES[case])
    initialise(model, base)
    train(model)
    filet.save_as_lora(model, tmp_path)
    loaded = filet.load(base_of(case), tmp_path)
    assert_same(adapter_tensors(loaded), adapter_tensors(model))
    assert_same(base_state(loaded), base_state(model))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    train(model)
    train(loaded)
    assert_same(adapter_tensors(loaded), adapter_tensors(model))
    assert_same(base_state(loaded), base_state(model))
    filet.save_as_lora(loaded, tmp_path / "again")
    again = PeftModel.from_pretrained(base_of(case), str(tmp_path / "again"))
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)


@pytest.mark.parametrize(("saved", "loaded"), [BASES, BASES[::-1]])
def test_load_can_switch_the_base_mode(saved: Any, loaded: Any, tmp_path: Path) -> None:
    model = initialised(saved)
    train(model)
    filet.save_as_lora(model, tmp_path)
    other = filet.load(llama(), tmp_path, base=loaded)
    assert other._filet_states["default"].base == loaded
    untouched = other if loaded == "untouched" else model
    assert_same(base_state(untouched), base_state(llama()))
    torch.testing.assert_close(logits(other), logits(model), **CLOSE)
    train(model)
    train(other)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-3, atol=1e-3)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an operation which failed must leave alone."""
    found: dict[str, Any] = {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "flags": {key: value.requires_grad for key, value in model.named_parameters()},
        "modules": {key: type(value) for key, value in model.named_modules()},
        "attributes": set(vars(model)),
    }
    if isinstance(model, PeftModel):
        found["configs"] = {
            key: (type(value), copy.deepcopy(value.to_dict()))
            for key, value in model.peft_config.items()
        }
        found["active"] = list(model.active_adapters)
        found["layers"] = {
            name: (list(layer.r), list(layer.lora_A), list(layer.active_adapters))
            for name, layer in lora_layers(model).items()
        }
        found["attributes"].discard("_filet_states")  # may be there, empty
        found["modules"].pop(
            "base_model"
        )  # its class follows the twins, and with none is as PEFT's
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert_same(after.pop("tensors"), before["tensors"])
    for key, value in after.items():
        assert value == before[key], key


def other_base() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] += 1e-4
    return model


@pytest.mark.parametrize("base", BASES)
def test_load_refuses_another_base_and_leaves_it_alone(base: str, tmp_path: Path) -> None:
    filet.save_as_lora(initialised(base, modules_to_save=["lm_head"]), tmp_path)
    model = other_base()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"another base model: the weight of model\.layers\.1\.self_attn\.q_proj"
    ):
        filet.load(model, tmp_path)
    assert_unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, where the model looks wrapped already
        wrap(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("error", [OSError("bad sector"), KeyboardInterrupt()])
def test_load_that_fails_late_leaves_the_base_alone(
    base: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    filet.save_as_lora(initialised(base), tmp_path)
    model = llama()
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "set_peft_model_state_dict", failing)
        with pytest.raises(type(error)):
            filet.load(model, tmp_path)
    assert_unchanged(model, before)
    filet.load(model, tmp_path)


def test_load_refuses_what_is_no_filet_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no filet\.json; expected a folder that filet\.save"):
        filet.load(llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(llama()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no filet\.json"):
        filet.load(llama(), tmp_path / "plain")
    filet.save_as_lora(initialised(), tmp_path)
    with pytest.raises(ValueError, match="base='somewhere'; expected one of"):
        filet.load(llama(), tmp_path, base="somewhere")
    description = json.loads((tmp_path / "filet.json").read_text())
    (tmp_path / "filet.json").write_text(json.dumps({**description, "format": "filet-adapter-0"}))
    with pytest.raises(ValueError, match=r"format 'filet-adapter-0'; expected 'filet-adapter-1'"):
        filet.load(llama(), tmp_path)


def test_load_refuses_a_base_that_lacks_a_module(tmp_path: Path) -> None:
    filet.save_as_lora(initialised(), tmp_path)
    with pytest.raises(ValueError, match=r"no linear module 'model\.layers\.1\..*', which"):
        filet.load(llama(num_hidden_layers=1), tmp_path)
    model = wrap(llama(attention_bias=True), bias="all")
    initialise(model, "residual")
    filet.save_as_lora(model, tmp_path)
    small = llama()
    small.load_state_dict(
        {
            k: v
            for k, v in llama(attention_bias=True).state_dict().items()
            if k in small.state_dict()
        }
    )
    before = snapshot(small)
    with pytest.raises(ValueError, match=r"no place for '.*_proj.*bias', which"):
        filet.load(small, tmp_path)
    assert_unchanged(small, before)


# The plain form goes back into the initialised model (how a Trainer resumes).


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_initialised_model_takes_its_plain_form_and_its_own(
    base: str, rslora: bool, tmp_path: Path
) -> None:
    model = initialised(base, use_rslora=rslora, lora_bias=True)
    train(model)
    filet.save_as_lora(model, tmp_path)
    raw = get_peft_model_state_dict(model)
    for state in (load_file(tmp_path / "adapter_model.safetensors"), raw):
        fresh = initialised(base, use_rslora=rslora, lora_bias=True)
        set_peft_model_state_dict(fresh, {key: value.clone() for key, value in state.items()})
        assert_same(adapter_tensors(fresh), adapter_tensors(model))
        assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("base", BASES)
def test_the_plain_form_of_another_initialisation_is_refused(base: str, tmp_path: Path) -> None:
    filet.save_as_lora(initialised(base), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    other = wrap(llama())
    initialise(other, base, select="max")
    before = snapshot(other)
    with pytest.raises(RuntimeError, match="another initialisation than this model's"):
        set_peft_model_state_dict(other, stored)
    assert_unchanged(other, before)
    for key, place in (("lora_A", (5, 3)), ("lora_B", (3, 5))):  # in A0, in −B0
        fresh = initialised(base)
        name = f"base_model.model.model.layers.1.mlp.down_proj.{key}.weight"
        changed = {k: v.clone() for k, v in stored.items()}
        changed[name][place] = torch.nextafter(changed[name][place], torch.tensor(9.0))
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj: .*another init"):
            set_peft_model_state_dict(fresh, changed)


# Restoring the base.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_base_is_bitwise_and_keeps_the_function(
    dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    original = llama().to(device, dtype)
    # Adam's epsilon is 0 in float16, the dtype that PEFT leaves a module to save in.
    modules = None if dtype == torch.float16 else ["lm_head"]
    model = wrap(copy.deepcopy(original), modules_to_save=modules)
    initialise(model, "residual")
    train(model)
    expected, weights = logits(model), effective_weights(model)
    rounding = {
        name: torch.finfo(dtype).eps / 2 * weight_of(layer.get_base_layer()).abs() + 1e-6
        for name, layer in lora_layers(model).items()
    }
    assert not torch.equal(
        base_state(model)["model.layers.0.mlp.down_proj.weight"],
        base_state(original)["model.layers.0.mlp.down_proj.weight"],
    )
    filet.restore_base(model)
    assert_same(base_state(model), base_state(original))
    for name, weight in effective_weights(model).items():
        assert ((weight - weights[name]).abs() <= rounding[name]).all(), name
    assert (logits(model) - expected).abs().max() < max(60 * torch.finfo(dtype).eps, 2e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(original))
    assert_frozen_twin(model)

    again = snapshot(model)
    filet.restore_base(model)
    assert_unchanged(model, again)
    train(model)
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(original, str(tmp_path))
    assert_same(effective_weights(plain), effective_weights(model), rtol=0, atol=2e-6)


def test_restore_base_after_a_change_of_dtype_or_device(device: torch.device) -> None:
    model = initialised()
    train(model)
    moved = copy.deepcopy(model).to(device)  # the factors at the start stay where they were
    filet.restore_base(moved)
    assert_same(base_state(moved), base_state(llama()))
    torch.testing.assert_close(logits(moved), logits(model), **CLOSE)
    half = copy.deepcopy(model).to(device, torch.bfloat16)
    filet.restore_base(half)
    assert_same(base_state(half), base_state(llama().bfloat16()))
    assert (logits(half) - logits(model)).abs().max() < 0.5  # bfloat16 A and B by then


def test_restore_base_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="'default' was not initialised by FILet"):
        filet.restore_base(wrap(llama()))
    model = initialised()
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merged into its weight; .*unmerge_adapter"):
        filet.restore_base(model)
    assert_unchanged(model, before)
    model.unmerge_adapter()
    filet.restore_base(model)
    assert_same(base_state(model), base_state(llama()))


# Untouched mode.


def assert_frozen_twin(model: PeftModel) -> None:
    """The twin is active beside its adapter, holds (A0, −B0), and is nobody's parameter."""
    assert set(model.active_adapters) == {"default", TWIN}
    assert not any(TWIN in name for name, _ in model.named_parameters())
    for name, start in model._filet_states["default"].layers.items():
        layer = lora_layers(model)[name]
        assert set(layer.active_adapters) == {"default", TWIN}
        assert torch.equal(layer.lora_A[TWIN].weight.cpu(), start.A0.cpu())
        assert torch.equal(layer.lora_B[TWIN].weight.cpu(), -start.B0.cpu())
        assert layer.scaling[TWIN] == layer.scaling["default"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".default" in name
    }


def _disable(model: PeftModel) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


HABITS: dict[str, Callable[[PeftModel], None]] = {
    "nothing": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("default"),
    "set_adapter of a list": lambda model: model.base_model.set_adapter(["default", TWIN]),
    "disable_adapter": _disable,
    "layers off and on": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "set_requires_grad": lambda model: model.set_requires_grad(["default", TWIN], True),
    "merge and back": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "train and eval": lambda model: (model.train(), model.eval()),
    "status": lambda model: (model.get_model_status(), model.get_layer_status()),
}


@pytest.mark.parametrize("habit", HABITS)
def test_untouched_survives_the_habits_of_peft(habit: str) -> None:
    model = initialised("untouched")
    before = logits(model)
    HABITS[habit](model)
    assert_frozen_twin(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    start = adapter_tensors(model)
    twins = {key: value.clone() for key, value in model.state_dict().items() if TWIN in key}
    for module in model.modules():
        module.zero_grad()
    model(**batches()[0]).loss.backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == start.keys()
    train(model)
    assert all(not torch.equal(value, start[key]) for key, value in adapter_tensors(model).items())
    assert_same({k: v for k, v in model.state_dict().items() if TWIN in k}, twins)
    if habit != "merge and back":  # rounds W twice
        assert_same(base_state(model), base_state(llama()))


def test_untouched_counts_and_trains_as_plain_lora(capsys: pytest.CaptureFixture[str]) -> None:
    initialised("untouched").print_trainable_parameters()
    wrap(llama()).print_trainable_parameters()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0] == printed[1]


def test_untouched_twin_follows_its_adapter() -> None:
    model = initialised("untouched")
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    train(model)
    expected = logits(model)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("base", BASES)
def test_what_asks_for_gradients_is_the_users_choice(base: str) -> None:
    model = wrap(llama())
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "norm" in name:  # LoRA-FA, and norms trained along
            parameter.requires_grad_("norm" in name)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    initialise(model, base)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    if base == "residual":
        filet.restore_base(model)
    else:
        initialise(model, base)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags


@pytest.mark.parametrize("base", BASES)
def test_a_scaling_that_was_set_by_hand(base: str, tmp_path: Path) -> None:
    model = wrap(llama())
    for layer in lora_layers(model).values():
        layer.set_scale("default", 0.5)
    initialise(model, base)
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    train(model)
    expected = logits(model)
    filet.restore_base(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    filet.save_as_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(plain), expected, **CLOSE)


def test_initialising_an_inactive_adapter_leaves_the_active_one_active() -> None:
    model = wrap(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    initialise(model, "untouched", name="other")
    assert model.active_adapters == ["default"]
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)


@pytest.mark.parametrize("case", ["plain", "patterns rslora", "conv1d", "classifier"])
@pytest.mark.parametrize("base", BASES)
def test_merge_and_unload(base: str, case: str) -> None:
    model = wrap(base_of(case), **CASES[case])
    initialise(model, base)
    train(model)
    expected, weights = logits(model), effective_weights(model)
    originals = {name: weight_of(base_of(case).get_submodule(name)) for name in weights}
    for name, start in model._filet_states["default"].layers.items():
        layer = lora_layers(model)[name]
        A, B = (weight_of(getattr(layer, key)["default"]) for key in ("lora_A", "lora_B"))
        difference = B @ A - start.B0.double() @ start.A0.double()
        trained = originals[name] + layer.scaling["default"] * difference
        torch.testing.assert_close(weights[name], trained, rtol=0, atol=2e-6)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    for name, weight in weights.items():
        torch.testing.assert_close(weight_of(merged.get_submodule(name)), weight, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def _pickled(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: PeftModel = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(
    base: str, copied: Callable[[PeftModel], PeftModel], tmp_path: Path
) -> None:
    model = initialised(base)
    train(model)
    expected, before = logits(model), snapshot(model)
    twice = copied(model)
    assert torch.equal(logits(twice), expected)
    train(twice)
    filet.save_as_lora(twice, tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(twice), **CLOSE)
    filet.restore_base(twice)
    assert_same(base_state(twice), base_state(llama()))
    twice.set_adapter("default")
    torch.testing.assert_close(logits(plain), logits(twice), **CLOSE)
    assert_unchanged(model, before)
    # The copy's layers split plain forms as well, each with factors of its own.
    for start in twice._filet_states["default"].layers.values():
        start.A0.add_(1)
    with pytest.raises(RuntimeError, match="another initialisation"):
        set_peft_model_state_dict(twice, load_file(tmp_path / "adapter_model.safetensors"))
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(model), logits(plain), **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_untouched_can_be_initialised_again(base: str, tmp_path: Path) -> None:
    model = wrap(llama(), lora_bias=True)
    initialise(model, "untouched", select="max")
    train(model)  # also the bias of B, which is to be zero again
    initialise(model, base)
    fresh = wrap(llama(), lora_bias=True)
    initialise(fresh, base)
    assert_same(model.state_dict(), fresh.state_dict())
    assert list(model.peft_config) == list(fresh.peft_config)
    assert model.active_adapters == fresh.active_adapters
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    train(model)
    filet.save_as_lora(model, tmp_path)
    # Of the two initialisations' hooks only the new one is left.
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


def test_residual_is_not_initialised_again_before_restore_base() -> None:
    model = initialised()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"call filet\.restore_base\(peft_model, 'default'\)"):
        initialise(model, "residual")
    assert_unchanged(model, before)
    filet.restore_base(model)
    initialise(model, "residual")
    fresh = initialised()
    assert_same(model.state_dict(), fresh.state_dict())


# All or nothing.


class _Failing:
    """A function that fails at its k-th call: before it has run, or after."""

    def __init__(self, function: Callable[..., Any], k: int, error: BaseException, after: bool):
        self.function, self.k, self.error, self.after = function, k, error, after
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.k and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.calls == self.k:
            raise self.error
        return result


PLACES = {
    "a factor": (adapters, "assign", 5),
    "a residual": (adapters, "write_residual", 3),
    "the twin": (PeftModel, "add_adapter", 1),
    "a layer of the twin": (LoraModel, "_create_and_replace", 3),
    "switching the twin on": (LoraModel, "set_adapter", 3),
    "switching the old twin off": (LoraModel, "set_adapter", 1),
}


def _places() -> Iterator[Any]:
    """Base mode, what the adapter was before, and the places that are passed then."""
    for base, start in itertools.product(BASES, ["plain", "untouched"]):
        for place in PLACES:
            if (
                place == "a factor"
                or (place == "a residual" and base == "residual")
                or (place == "switching the old twin off" and start == "untouched")
                or (place not in ("a factor", "a residual") and base == "untouched")
            ):
                yield pytest.param(base, start, place, id=f"{base}-{start}-{place}")


# PEFT cleans up after an Exception, in part, and not after Ctrl-C.
@pytest.mark.parametrize(
    ("error", "after"), [(MemoryError("full"), False), (KeyboardInterrupt(), True)]
)
@pytest.mark.parametrize(("base", "start", "place"), list(_places()))
def test_an_exception_leaves_everything_as_it_was(
    base: Any,
    start: str,
    place: str,
    error: BaseException,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if start == "untouched":
        model = initialised("untouched")
        train(model)
    else:
        model = wrap(llama())
    statistics = filet.collect_statistics(
        model, batches(), FiletConfig(samples=None), show_progress_bar=False
    )
    config = FiletConfig(base=base, select="max", scaling="singular")
    expected, before = logits(model), snapshot(model)
    owner, name, k = PLACES[place]
    failing = _Failing(getattr(owner, name), k, error, after)
    with monkeypatch.context() as patch:
        # A function, so that it is bound where the owner is a class.
        patch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))
        with pytest.raises(type(error)):
            filet.apply_statistics(model, statistics, config)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    filet.apply_statistics(model, statistics, config)  # nothing is left in the way
    fresh = wrap(llama())
    filet.apply_statistics(fresh, statistics, config)
    assert_same(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("place", ["the twin", "a layer of the twin", "switching the twin on"])
def test_restore_base_that_fails_leaves_everything_as_it_was(
    place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialised()
    train(model)
    expected, before = logits(model), snapshot(model)
    owner, name, k = PLACES[place]
    failing = _Failing(getattr(owner, name), k, error, after=True)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))
        with pytest.raises(type(error)):
            filet.restore_base(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    filet.restore_base(model)
    assert_same(base_state(model), base_state(llama()))


def test_factors_on_the_meta_device_go_back_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, lora_bias=True)
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    failing = _Failing(adapters.write_residual, 3, KeyboardInterrupt(), after=True)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "write_residual", failing)
        with pytest.raises(KeyboardInterrupt):
            initialise(model, "residual")
    assert {p.device.type for key, p in model.named_parameters() if "lora_" in key} == {"meta"}
    assert_same(base_state(model), base_state(llama()))
    initialise(model, "residual")
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)


# Raw saves.


@pytest.mark.parametrize("case", ["rslora", "patterns", "conv1d"])
def test_an_adapter_and_its_twin_saved_raw_are_the_model_together(
    case: str, tmp_path: Path
) -> None:
    model = wrap(base_of(case), **CASES[case])
    initialise(model, "untouched")
    train(model)
    with pytest.warns(UserWarning, match=r"filet\.save_as_lora"):
        model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base_of(case), str(tmp_path))
    assert (logits(plain) - logits(model)).abs().max() > 0.3  # what the warning is about
    plain.load_adapter(str(tmp_path / TWIN), TWIN)
    plain.base_model.set_adapter(["default", TWIN])
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


@pytest.fixture
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def raw_save_warnings(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in found if "filet.save_as_lora" in str(w.message)]


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_raw_save_warns_once(
    base: str, restored: bool, tmp_path: Path, recorded: list[warnings.WarningMessage]
) -> None:
    model = initialised(base)
    if restored:
        filet.restore_base(model)
    filet.save_as_lora(model, tmp_path / "converted")
    assert raw_save_warnings(recorded) == []
    model.save_pretrained(tmp_path / "raw")
    (message,) = raw_save_warnings(recorded)
    assert str(tmp_path / "raw") in message and "filet.FiletCallback" in message
    recorded.clear()
    model.save_pretrained(tmp_path / "raw")  # and each time
    assert len(raw_save_warnings(recorded)) == 1


def test_plain_adapters_save_without_a_warning(
    tmp_path: Path, recorded: list[warnings.WarningMessage]
) -> None:
    model = initialised("untouched")
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    filet.save_as_lora(model, tmp_path / "converted")
    PeftModel.from_pretrained(llama(), str(tmp_path / "converted")).save_pretrained(tmp_path / "b")
    assert raw_save_warnings(recorded) == []
