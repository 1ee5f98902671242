"""FILet meets PEFT: every LoRA option that changes what is stored or run, on every kind of model.

For each pair either the function is preserved to rounding through a whole life (initialise, train,
save, load in plain PEFT and by filet.load, switch off, other adapters, merge, delete, write the
residual), or FILet refuses in one line, or PEFT itself does. What becomes of each stands as a table
in docs/adapters.md; ``python tests/test_meets_peft.py`` writes it anew.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import filet
import models
from filet import FiletConfig
from filet.model.factors import StartedFactor
from initialised import LOUD, UNTOUCHED
from pictures import qwen2_vl, with_images

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # PEFT's, of what each option means for it
]

DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- tests/test_meets_peft.py writes from here -->", "<!-- to here -->"
KEPT, REFUSED, NOT_PEFTS, ABSENT = "kept", "refused", "PEFT refuses", "–"
PEFT = "0.21.2"  # whose options the table is of
# Two float32 models with logits of order one, computed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made anew, its batches, and how PEFT names its parts."""

    make: Callable[[], Any]
    batches: list[dict[str, Tensor]]
    linear: list[str]  # a few names of linear layers
    task: str | None
    head: str | None = None  # a linear layer that the loss comes from
    embedding: str | None = None
    tokens: bool = True
    repeats: bool = False  # its blocks can be repeated (layer_replication)


def _of_case(name: str, linear: list[str], task: str | None, **more: Any) -> Kind:
    c = models.case(name)
    made = functools.partial(copy.deepcopy, c.model)
    return Kind(made, list(models.loader(c.samples[:8], 4)), linear, task, **more)


def _qwen3_moe() -> Kind:
    config = Qwen3MoeConfig(
        vocab_size=models.VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = models.randomised(Qwen3MoeForCausalLM(config))
    batches = list(models.loader(models.case("llama").samples[:8], 4))
    return Kind(
        functools.partial(copy.deepcopy, model), batches, ["q_proj", "v_proj", "o_proj"],
        "CAUSAL_LM", "lm_head", "embed_tokens", repeats=False,
    )  # fmt: skip


def _qwen2_vl() -> Kind:
    c = qwen2_vl()
    batches = [with_images(c.samples[:2]), with_images(c.samples[1:])]
    made = functools.partial(copy.deepcopy, c.model)
    language = r".*language_model\..*\.(q_proj|down_proj|v_proj)"
    return Kind(made, batches, [language], None, "lm_head", None, tokens=False)


KINDS: dict[str, Callable[[], Kind]] = {
    "Llama": lambda: _of_case(
        "llama", ["q_proj", "k_proj", "up_proj", "down_proj"], "CAUSAL_LM", head="lm_head",
        embedding="embed_tokens", repeats=True,
    ),
    "GPT-2": lambda: _of_case(
        "gpt2", ["c_attn", "c_fc", "c_proj"], "CAUSAL_LM", head="lm_head", embedding="wte"
    ),
    "T5": lambda: _of_case("t5", ["q", "v", "wi", "wo"], "SEQ_2_SEQ_LM", embedding="shared"),
    "ViT": lambda: _of_case("vit", ["q_proj", "fc1"], None, head="classifier", tokens=False),
    "BERT, a head": lambda: _of_case(
        "bert class", ["query", "value", "intermediate.dense"], "SEQ_CLS",
        embedding="word_embeddings",
    ),
    "Qwen3-MoE": _qwen3_moe,
    "Qwen2-VL": _qwen2_vl,
}  # fmt: skip


@functools.cache
def kind_of(name: str) -> Kind:
    return KINDS[name]()


def settings_of(kind: Kind) -> dict[str, Any]:
    targets: Any = kind.linear if len(kind.linear) > 1 else kind.linear[0]
    return {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": kind.task}


Option = Callable[[Kind], "dict[str, Any] | None"]  # None: the model has no such thing


def _also(kind: Kind, *names: str | None) -> dict[str, Any] | None:
    if None in names or len(kind.linear) == 1:
        return None
    return {"target_modules": [*kind.linear, *names]}


def _sub_config(name: str, **values: Any) -> Any:
    """A config of PEFT's; None where this PEFT is older."""
    import peft

    kind = getattr(peft, name, None) or getattr(peft.tuners.lora.config, name, None)
    return None if kind is None else kind(**values)


def _needs(field: str, value: Any) -> Option:
    known = field in LoraConfig.__dataclass_fields__ and value is not None
    return lambda kind: {field: value} if known else None


OPTIONS: dict[str, Option] = {
    "nothing else": lambda kind: {},
    "target_modules='all-linear'": lambda kind: {"target_modules": "all-linear"},
    "target_modules: and the head": lambda kind: _also(kind, kind.head),
    "target_modules: and the embedding": lambda kind: _also(kind, kind.embedding),
    "layers_to_transform": lambda kind: {"layers_to_transform": [0]},
    "exclude_modules": lambda kind: {"exclude_modules": r".*\.0\..*"},
    "rank_pattern, alpha_pattern": lambda kind: {
        "rank_pattern": {kind.linear[0]: 2, kind.linear[-1]: 6},
        "alpha_pattern": {kind.linear[0]: 3},
    },
    "use_rslora": lambda kind: {"use_rslora": True, "r": 6, "lora_alpha": 7},
    "use_rslora, rank_pattern": lambda kind: {
        "use_rslora": True,
        "rank_pattern": {kind.linear[0]: 3},
    },
    "lora_dropout": lambda kind: {"lora_dropout": 0.3},
    "lora_bias": lambda kind: {"lora_bias": True},
    "bias='all'": lambda kind: {"bias": "all"},
    "bias='lora_only'": lambda kind: {"bias": "lora_only"},
    "modules_to_save": lambda kind: {"modules_to_save": [kind.head]} if kind.head else None,
    "trainable_token_indices": lambda kind: (
        {"trainable_token_indices": [3, 5]} if kind.tokens and kind.embedding else None
    ),
    "ensure_weight_tying": lambda kind: (
        {"ensure_weight_tying": True, "modules_to_save": [kind.embedding]}
        if kind.embedding
        else None
    ),
    "layer_replication": lambda kind: (
        {"layer_replication": [[0, 2], [0, 2]]} if kind.repeats else None
    ),
    "init_lora_weights=False": lambda kind: {"init_lora_weights": False},
    "init_lora_weights='gaussian'": lambda kind: {"init_lora_weights": "gaussian"},
    "init_lora_weights='orthogonal'": lambda kind: {"init_lora_weights": "orthogonal"},
    "init_lora_weights='eva'": lambda kind: {"init_lora_weights": "eva"},
    "init_lora_weights='pissa'": lambda kind: {"init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'": lambda kind: {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora'": lambda kind: {"init_lora_weights": "olora"},
    "init_lora_weights='loftq'": lambda kind: {
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    },
    "init_lora_weights='mica'": lambda kind: {"init_lora_weights": "mica"},
    "use_dora": lambda kind: {"use_dora": True},
    "alora_invocation_tokens": lambda kind: (
        {"alora_invocation_tokens": [5]} if kind.task == "CAUSAL_LM" else None
    ),
    "use_bdlora": lambda kind: _needs(
        "use_bdlora",
        _sub_config(
            "BdLoraConfig", target_modules_bd_a=[kind.linear[0]], nblocks=2, match_strict=False
        ),
    )(kind),
    "velora_config": _needs("velora_config", _sub_config("VeloraConfig")),
    "monteclora_config": _needs("monteclora_config", _sub_config("MontecloraConfig")),
    "kasa_config": _needs("kasa_config", _sub_config("KasaConfig")),
}


@torch.no_grad()
def logits(model: Any, kind: Kind) -> Tensor:
    model.eval()
    found: Tensor = torch.cat([model(**b).logits.flatten(0, -2) for b in kind.batches])
    return found.float()


def train(model: Any, kind: Kind) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    torch.manual_seed(0)
    for batch in kind.batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def initialised_layers(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, StartedFactor)]


def wrapped(kind: Kind, lora: dict[str, Any]) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(kind.make(), LoraConfig(**{**settings_of(kind), **lora}))


def outcome(name: str, option: str, settings: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What becomes of the pair, a cell of the table, and why it is refused, if it is.

    An AssertionError where it goes wrong.
    """
    kind = kind_of(name)
    lora = OPTIONS[option](kind)
    if lora is None:
        return ABSENT, ""
    try:
        model = wrapped(kind, lora)
    except (ValueError, TypeError, AttributeError, ImportError):
        return NOT_PEFTS, ""
    parameters = {key: value.clone() for key, value in model.state_dict().items()}
    config = FiletConfig(**settings, samples=None)
    try:
        filet.initialize_lora_filet_weights(model, kind.batches, config, show_progress_bar=False)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        for key, value in model.state_dict().items():
            assert torch.equal(value, parameters[key]), f"{key} changed though it was refused"
        return REFUSED, _reason(error)
    assert bool(initialised_layers(model)) == (config.start == "untouched")
    live(model, kind, lora, folder)
    return KEPT, ""


def live(model: PeftModel, kind: Kind, lora: dict[str, Any], folder: Path) -> None:
    """From the start to the end of an adapter, its function compared at every step."""
    base = kind.make()
    replicated = "layer_replication" in lora
    with model.disable_adapter():
        original = logits(model, kind)
    if not replicated:
        assert torch.equal(original, logits(base, kind)), "the base is not what it was"
    torch.testing.assert_close(logits(model, kind), original, **CLOSE)

    train(model, kind)
    expected = logits(model, kind)
    assert (expected - original).abs().max() > 1e-3, "nothing was learned: the rest says nothing"

    filet.save_as_lora(model, folder)
    plain = PeftModel.from_pretrained(kind.make(), str(folder))
    torch.testing.assert_close(logits(plain, kind), expected, **CLOSE)
    loaded = filet.load(kind.make(), folder)
    torch.testing.assert_close(logits(loaded, kind), expected, **CLOSE)
    assert initialised_layers(loaded) == initialised_layers(model)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()

    other_adapters(model, kind, lora, original, expected, folder)
    merged(model, kind, lora, expected)
    written(loaded, kind, expected)


def other_adapters(
    model: PeftModel, kind: Kind, lora: dict[str, Any], original: Tensor, expected: Tensor,
    folder: Path,
) -> None:  # fmt: skip
    biased = lora.get("bias", "none") != "none"  # those are the base's own, for all adapters
    if not biased and "layer_replication" not in lora:
        with model.disable_adapter():
            assert torch.equal(logits(model, kind), original)
        rest = {
            k: v for k, v in lora.items() if k not in ("modules_to_save", "ensure_weight_tying")
        }
        rest["init_lora_weights"] = True
        model.add_adapter("other", LoraConfig(**{**settings_of(kind), **rest}))
        model.set_adapter("other")
        torch.testing.assert_close(logits(model, kind), original, **CLOSE)
        model.load_adapter(str(folder), "own", is_trainable=False)
        model.set_adapter("own")
        torch.testing.assert_close(logits(model, kind), expected, **CLOSE)
        model.set_adapter("default")
        model.delete_adapter("other")
        model.delete_adapter("own")
    torch.testing.assert_close(logits(model, kind), expected, **CLOSE)


def merged(model: PeftModel, kind: Kind, lora: dict[str, Any], expected: Tensor) -> None:
    if "layer_replication" in lora:  # PEFT forbids it, in words of its own
        return
    if lora.get("lora_bias") and any(
        layer.get_base_layer().bias is None  # type: ignore[union-attr]
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ):
        return  # as above
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if any(owners.count(id(weight)) > 1 for weight in weights if weight is not None):
        return  # of a tied weight PEFT's merge changes the other module too
    alone = copy.deepcopy(model)
    torch.testing.assert_close(logits(alone.merge_and_unload(), kind), expected, **CLOSE)


def written(model: PeftModel, kind: Kind, expected: Tensor) -> None:
    """The residual, where nobody else has the weight."""
    try:
        filet.write_residual(model)
    except ValueError as error:
        why = "is shared" if initialised_layers(model) else "has no frozen half"
        assert why in str(error), error
    else:
        assert not initialised_layers(model)
    torch.testing.assert_close(logits(model, kind), expected, **CLOSE)


def _reason(error: Exception) -> str:
    """The part of a message that says why, without the names of modules."""
    for pattern in (
        r"by which (PEFT changes the base weights)",
        r"its adapter is a (\w+, not plain LoRA)",
    ):
        if found := re.search(pattern, str(error)):
            return found[1]
    raise AssertionError(f"refused without a reason that the table knows: {error}")


@functools.cache
def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """(option, kind of model) → the cell that docs/adapters.md has, and the reason."""
    text = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in text.strip().splitlines()]
    found = {}
    for option, *cells, why in rows[2:]:
        for name, cell in zip(rows[0][1:-1], cells, strict=True):
            found[option.strip("`"), name] = cell, why if cell == REFUSED else ""
    return found


def check(name: str, option: str, settings: dict[str, Any], folder: Path) -> None:
    newest = importlib.metadata.version("peft") == PEFT
    try:
        found = outcome(name, option, settings, folder)
    except Exception:
        if newest or peft_keeps(kind_of(name), OPTIONS[option](kind_of(name)), folder / "plain"):
            raise
        pytest.skip("this PEFT does not keep the function by itself")
    if newest:
        assert found == documented()[option, name]


def peft_keeps(kind: Kind, lora: dict[str, Any] | None, folder: Path) -> bool:
    """Whether an older PEFT keeps the function without FILet, with today's transformers."""
    model = wrapped(kind, lora or {})
    try:
        if not torch.allclose(logits(model, kind), logits(kind.make(), kind), **CLOSE):
            return False
        train(model, kind)
        model.save_pretrained(str(folder))
        again = PeftModel.from_pretrained(kind.make(), str(folder))
        again.add_adapter("other", LoraConfig(**{**settings_of(kind), **(lora or {})}))
        again.set_adapter("other")
        logits(again, kind)
        again.set_adapter("default")
        return torch.allclose(logits(again, kind), logits(model, kind), **CLOSE)
    except Exception:
        return False


@pytest.fixture(autouse=True)
def no_loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoftQ takes bitsandbytes and a GPU; the table is of what PEFT does without."""
    monkeypatch.setattr("peft.utils.loftq_utils.is_bnb_available", lambda: False, raising=False)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_the_function_is_kept_or_refused(name: str, option: str, tmp_path: Path) -> None:
    check(name, option, LOUD, tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_by_the_default_as_well(name: str, option: str, tmp_path: Path) -> None:
    check(name, option, {}, tmp_path)


@pytest.mark.parametrize("option", ["nothing else", "modules_to_save", "bias='all'", "use_rslora"])
@pytest.mark.parametrize("name", KINDS)
def test_with_the_papers_own_scaling(name: str, option: str, tmp_path: Path) -> None:
    check(name, option, UNTOUCHED, tmp_path)


def table() -> str:
    rows = [["option", *KINDS, "why refused"], ["---"] * (len(KINDS) + 2)]
    for option in OPTIONS:
        cells, reasons = [], set()
        for name in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                cell, why = outcome(name, option, LOUD, Path(folder))
            cells.append(cell)
            reasons |= {why} - {""}
        label = option if option == "nothing else" else f"`{option}`"
        rows.append([label, *cells, ", ".join(sorted(reasons))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
