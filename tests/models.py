"""Tiny models of every kind with data for them, and what an independent run of them says.

The truth (:func:`observe`, :func:`truth`) knows nothing of the library: every sample runs alone and
unpadded through a float64 copy of the plain model, whose weights ask for gradients; the loss is the
summed cross-entropy that the test computes; and :mod:`oracle` holds the paper's algorithm.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

import oracle
from filet import FiletConfig, collect_statistics
from filet_kernels import fisher_energies

VOCAB = 29
CLASSES = 5
LENGTHS = (5, 9, 3, 7, 4, 8, 6, 9, 5, 7, 3, 6)
RANK = 4

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A plain model in float32, its samples (each without a batch dimension) and its targets."""

    model: nn.Module
    samples: list[Sample]
    targets: list[str]
    shift: bool = False  # the logits predict the *next* label
    forward_fn: Callable[[Any, Any], Any] | None = None


# Models. Dropout is on in every config that has one: a pass that leaves it on is wrong.


# Settings of a model made like Llama.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def llama(layers: int = 2, **config: Any) -> LlamaForCausalLM:
    settings = {**SMALL, "num_hidden_layers": layers, "attention_dropout": 0.5, **config}
    return randomised(LlamaForCausalLM(LlamaConfig(**settings)))


def _bert(kind: type[nn.Module], **more: Any) -> nn.Module:
    config = BertConfig(
        **more,
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return randomised(kind(config))


class Perceptron(nn.Module):
    """Token by token, so that what stands in a padded row stays there. Twice the same linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 10)
        self.up = nn.Linear(10, 18)
        self.twice = nn.Linear(18, 18)
        self.down = nn.Linear(18, 7)
        self.head = nn.Linear(7, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = torch.tanh(self.up(self.embedding(input_ids)))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(self.down(x))


class Experts(nn.Module):
    """Tokens go to the expert of their id modulo 3; the fourth expert never sees one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12, bias=False))
            for _ in range(4)
        )
        self.head = nn.Linear(12, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embedding(input_ids)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (input_ids % 3 == index).nonzero(as_tuple=True)
            if rows[0].numel():
                y = y.index_put(rows, expert(x[rows]))
        logits = self.head(x + y)
        return SimpleNamespace(
            logits=logits, loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


def mean_and_terms(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """A forward_fn for a model that knows no labels: (mean loss, terms)."""
    logits = model(batch["input_ids"])
    logits = getattr(logits, "logits", logits)
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, -2), labels), int((labels != -100).sum())


def randomised(model: Any, seed: int = 0) -> Any:
    """Weights that keep activations near one, and biases and norms that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.add_(noise, alpha=0.2)
    return model


# Data.


def _text(seed: int, positions: bool = False) -> list[Sample]:
    """Causal: labels are the ids, without those of a prompt (of another length each)."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % 3] = -100
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if positions:
            sample["position_ids"] = torch.arange(length)
        samples.append(sample)
    return samples


def _tagged(seed: int, classes: int) -> list[Sample]:
    """A label of its own for two positions of three."""
    generator = torch.Generator().manual_seed(seed)
    samples = _text(seed)
    for sample in samples:
        labels = torch.randint(0, classes, sample["labels"].shape, generator=generator)
        sample["labels"] = torch.where(torch.arange(labels.numel()) % 3 == 1, -100, labels)
    return samples


def _classified(seed: int) -> list[Sample]:
    return [s | {"labels": torch.tensor(i % CLASSES)} for i, s in enumerate(_text(seed))]


def _images(seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "labels": torch.tensor(index % CLASSES),
        }
        for index in range(len(LENGTHS))
    ]


def _translated(seed: int) -> list[Sample]:
    """Encoder and decoder of different lengths."""
    sources, goals = _text(seed), _text(seed + 1)[::-1]
    return [s | {"labels": g["input_ids"]} for s, g in zip(sources, goals, strict=True)]


_PADDING = {"labels": -100}


def collate(samples: list[Sample], side: str = "right") -> dict[str, Tensor]:
    """Pad sequences on that side, stack everything else."""
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if values[0].dim() != 1:
            batch[key] = torch.stack(values)
            continue
        longest = max(value.numel() for value in values)
        rows = torch.full((len(values), longest), _PADDING.get(key, 0))
        for row, value in zip(rows, values, strict=True):
            place = slice(None, value.numel()) if side == "right" else slice(-value.numel(), None)
            row[place] = value
        batch[key] = rows
    return batch


def loader(samples: list[Sample], batch_size: int = 4, side: str = "right") -> DataLoader:
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=functools.partial(collate, side=side),
    )


# Cases.


def linears(model: nn.Module, *without: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not name.endswith(without)
    ]


def _case(model: nn.Module, samples: list[Sample], *without: str, **more: Any) -> Case:
    return Case(model, samples, linears(model, *without) if without else linears(model), **more)


def _llama() -> Case:
    return _case(llama(), _text(1), "lm_head", shift=True)


def _gpt2() -> Case:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=16,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
    )
    model = randomised(GPT2LMHeadModel(config))
    return _case(model, _text(2, positions=True), "lm_head", shift=True)


def _opt() -> Case:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        word_embed_proj_dim=24,
        max_position_embeddings=16,
        dropout=0.5,
        pad_token_id=1,
    )
    return _case(randomised(OPTForCausalLM(config)), _text(3), "lm_head", shift=True)


_PICTURES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_labels": CLASSES,
}


def _vit() -> Case:
    config = ViTConfig(intermediate_size=40, hidden_dropout_prob=0.5, **_PICTURES)
    return _case(randomised(ViTForImageClassification(config)), _images(7))


def _dinov2() -> Case:
    config = Dinov2Config(mlp_ratio=2, hidden_dropout_prob=0.5, **_PICTURES)
    return _case(randomised(Dinov2ForImageClassification(config)), _images(8))


def _t5() -> Case:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=1,
        num_heads=3,
        dropout_rate=0.5,
        decoder_start_token_id=0,
    )
    return _case(randomised(T5ForConditionalGeneration(config)), _translated(9), "lm_head")


def _bart() -> Case:
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=16,
        dropout=0.5,
        attention_dropout=0.5,
        encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _case(randomised(BartForConditionalGeneration(config)), _translated(10), "lm_head")


def _albert() -> Case:
    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=12,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=16,
        hidden_dropout_prob=0.5,
    )
    return _case(randomised(AlbertForMaskedLM(config)), _tagged(11, VOCAB), "decoder")


def _perceptron() -> Case:
    return _case(randomised(Perceptron()), _tagged(12, VOCAB), forward_fn=mean_and_terms)


_BUILDERS: dict[str, Callable[[], Case]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert tokens": lambda: _case(_bert(BertForTokenClassification), _tagged(4, CLASSES)),
    "bert masked": lambda: _case(_bert(BertForMaskedLM), _tagged(5, VOCAB)),
    "bert class": lambda: _case(_bert(BertForSequenceClassification), _classified(6)),
    "vit": _vit,
    "dinov2": _dinov2,
    "t5": _t5,
    "bart": _bart,
    "albert": _albert,
    "perceptron": _perceptron,
    "experts": lambda: _case(randomised(Experts()), _tagged(13, VOCAB), "head"),
}


def _of_llama(kind: type[nn.Module], tied: bool = False) -> nn.Module:
    return randomised(kind(llama(tie_word_embeddings=tied).config))


# What a folder may hold that is no causal language model, or lacks a weight of one; and what is
# said of it.
UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "classifier": (
        lambda: _of_llama(LlamaForSequenceClassification),
        "is a LlamaForSequenceClassification",
    ),
    "classifier, tied": (
        lambda: _of_llama(LlamaForSequenceClassification, tied=True),
        "is a LlamaForSequenceClassification",
    ),
    "no head": (lambda: _of_llama(LlamaModel), "has no weight for lm_head.weight;"),
    "token classifier": (
        lambda: case("bert tokens").model,
        "is a BertForTokenClassification",
    ),
    "masked": (lambda: case("bert masked").model, "is a BertForMaskedLM"),
    "bert": (lambda: _bert(BertModel), "'bert' and attends both ways"),
    "bert, causal by name": (lambda: _bert(BertLMHeadModel), "'bert' and attends both ways"),
    "encoder-decoder": (lambda: case("bart").model, "is an encoder-decoder"),
    "images": (lambda: case("vit").model, "is a ViTForImageClassification"),
    "bare images": (
        lambda: ViTModel(case("vit").model.config),
        "'vit' (in config.json), of which transformers has no causal",
    ),
}
# Causal language models that look like them.
FIT: dict[str, Callable[[], nn.Module]] = {
    "no head, tied": lambda: _of_llama(LlamaModel, tied=True),
    "bert, decoder": lambda: _bert(BertLMHeadModel, is_decoder=True),
}


KINDS = (
    "llama",
    "gpt2",
    "opt",
    "bert tokens",
    "bert masked",
    "bert class",
    "vit",
    "dinov2",
    "t5",
    "bart",
    "albert",
    "perceptron",
)


@functools.cache
def case(kind: str) -> Case:
    """Shared between tests: its model is copied before anything is done to it."""
    return _BUILDERS[kind]()


def peft_of(
    some_case: Case, device: torch.device | str = "cpu", dtype: Any = torch.float32, **lora: Any
) -> PeftModel:
    """A LoRA model over a copy of the case's, in train mode as PEFT's users have it."""
    settings = {"r": RANK, "lora_alpha": 8, "target_modules": some_case.targets, **lora}
    model = copy.deepcopy(some_case.model).to(device=device, dtype=dtype).train()
    return get_peft_model(model, LoraConfig(**settings))


# The truth.


def _alone(sample: Sample) -> Sample:
    """A batch of one."""
    return {key: value.unsqueeze(0) for key, value in sample.items()}


def observe(
    model: nn.Module,
    names: Iterable[str],
    samples: list[Sample],
    shift: bool = False,
    dtype: torch.dtype = torch.float64,
    batch_of: Callable[[Sample], Sample] = _alone,
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """x (T, n) and g (T, m) of every module, and the number of terms of the summed loss."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    device = next(model.parameters()).device
    inputs: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2))
            output.register_hook(
                lambda g: gradients.setdefault(name, []).append(g.detach().flatten(0, -2))
            )

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    terms = 0
    for sample in samples:
        batch = {key: value.to(device) for key, value in batch_of(sample).items()}
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        output = model(**batch)
        logits, labels = getattr(output, "logits", output), batch["labels"]
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(dtype, torch.float32)),
            labels.flatten(),
            reduction="sum",
        )
        loss.backward()
        terms += int((labels != -100).sum())
    return {n: (torch.cat(inputs[n]), torch.cat(gradients[n])) for n in inputs}, terms


def weight_of(model: nn.Module, name: str) -> Tensor:
    """W (m, n), detached."""
    module = model.get_submodule(name)
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator,assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def true_energies(
    model: nn.Module,
    names: Iterable[str],
    samples: list[Sample],
    shift: bool = False,
    dtype: torch.dtype = torch.float64,
    batch_of: Callable[[Sample], Sample] = _alone,
) -> dict[str, Tensor]:
    """Energies of every module as Algorithm 1 has them, on the CPU."""
    seen, terms = observe(model, names, samples, shift, dtype, batch_of)
    return {
        name: oracle.fisher_energies(weight_of(model, name), x, g.double() / terms).cpu()
        for name, (x, g) in seen.items()
    }


@functools.cache
def truth(kind: str) -> dict[str, Tensor]:
    """The energies of a case in float64, over all of its samples."""
    c = case(kind)
    return true_energies(c.model, c.targets, c.samples, c.shift)


def energies_of(
    peft_model: PeftModel,
    batches: Iterable[Any],
    forward_fn: Callable[[Any, Any], Any] | None = None,
    **config: Any,
) -> dict[str, Tensor]:
    """Energies of every module from the library's pass, on the CPU."""
    statistics = collect_statistics(
        peft_model,
        batches,
        FiletConfig(**{"samples": None, **config}),
        forward_fn=forward_fn,
        show_progress_bar=False,
    )
    weights = {
        name: layer.get_base_layer()
        for name, layer in peft_model.base_model.model.named_modules()
        if name in statistics.moments
    }
    return {
        name: fisher_energies(weight_of(weights[name], ""), moments).cpu()
        for name, moments in statistics.moments.items()
    }


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any energy, and its module. NaN where the modules differ."""
    if actual.keys() != expected.keys():
        return float("nan"), f"modules differ: {sorted(actual.keys() ^ expected.keys())}"
    errors = {}
    for name, truth in expected.items():
        off = (actual[name] - truth).abs()
        errors[name] = float(torch.where(off == 0, 0.0, off / truth).max())  # 0 may be a truth
    return max(((error, name) for name, error in errors.items()), key=lambda pair: pair[0])


def assert_energies(actual: dict[str, Tensor], expected: dict[str, Tensor], rel: float) -> None:
    error, name = worst(actual, expected)
    assert error <= rel, f"{name}: an energy is off by {error:.3g}, expected at most {rel:g}"
