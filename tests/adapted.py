"""Small models with LoRA, initialised and trained, and what they compute.

The start has a frozen half and is large (scaling="singular": B0 A0 = W V̂ V̂ᵀ), so that one that was
lost, or is of a wrong sign or scaling, changes the logits by their own size. Statistics of a model
that is made here more than once are taken once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

import filet
from filet import FiletConfig, FiletReport, Statistics
from initialised import LOUD
from models import SMALL

VOCAB = 31
TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]
# Two float32 models of two layers with logits of order one, computed in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


# Models and data.


def llama(kind: type[nn.Module] = LlamaForCausalLM, **config: Any) -> Any:
    settings = {**SMALL, "vocab_size": VOCAB, **config}
    return scaled(kind(LlamaConfig(**settings)))


def classifier() -> Any:
    return llama(LlamaForSequenceClassification, num_labels=2)


def gpt2() -> Any:
    config = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return scaled(GPT2LMHeadModel(config))


def scaled(model: Any) -> Any:
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
    """A module "fc" and another whose name ends in ".fc", in no model of transformers."""

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
        return CausalLMOutput(loss=loss, logits=logits)


def batches(device: torch.device | str = "cpu", classes: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        ids = torch.randint(1, VOCAB, (4, 7), generator=generator).to(device)
        labels = ids[:, 0] % classes if classes else ids
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def _batches_for(model: Any) -> list[dict[str, Tensor]]:
    classes = 2 if isinstance(model.get_base_model(), LlamaForSequenceClassification) else 0
    return batches(next(model.parameters()).device, classes)


# Steps.


def wrap(model: nn.Module, name: str = "default", **lora: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    autocast = lora.pop("autocast_adapter_dtype", True)
    config = LoraConfig(**{**settings, **lora})
    return get_peft_model(model, config, name, autocast_adapter_dtype=autocast)


def initialise(model: PeftModel, name: str = "default", **config: Any) -> FiletReport:
    """The whole of it, with the pass."""
    settings: dict[str, Any] = {**LOUD, "samples": None, **config}
    with warnings.catch_warnings():  # that an embedding or an inactive adapter is left alone
        warnings.simplefilter("ignore")
        return filet.initialize_lora_filet_weights(
            model,
            _batches_for(model),
            FiletConfig(**settings),
            adapter_name=name,
            show_progress_bar=False,
        )


@functools.cache
def statistics_of(make: Callable[[], Any] = llama) -> Statistics:
    """Of every linear layer that PEFT takes."""
    model = wrap(make(), target_modules="all-linear", task_type=None)
    config = FiletConfig(samples=None)
    return filet.collect_statistics(model, _batches_for(model), config, show_progress_bar=False)


def start(
    model: PeftModel, name: str = "default", make: Callable[[], Any] = llama, **config: Any
) -> PeftModel:
    """Initialise an adapter of what ``make`` makes, from its statistics."""
    settings: dict[str, Any] = {**LOUD, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filet.apply_statistics(model, statistics_of(make), FiletConfig(**settings), name)
    return model


def initialised(name: str = "default", make: Callable[[], Any] = llama, **lora: Any) -> PeftModel:
    """``make()`` with an initialised adapter."""
    return start(wrap(make(), name, **lora), name, make)


def train(model: Any, steps: int = 2) -> None:
    """AdamW on whatever asks for a gradient, from a fresh optimiser."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for batch in itertools.islice(itertools.cycle(_batches_for(model)), steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(name: str = "default", make: Callable[[], Any] = llama, **lora: Any) -> PeftModel:
    model = initialised(name, make, **lora)
    train(model)
    return model


# What there is to compare.


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    training = model.training
    model.eval()
    batch = batches(next(model.parameters()).device)[0]
    batch.pop("labels")
    found: Tensor = model(**batch, **kwargs).logits.float().cpu()
    model.train(training)
    return found


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """The LoRA layers over linear modules."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and module.lora_A
    }


def weight_of(module: Any) -> Tensor:
    """W (m, n) in float64."""
    weight: Tensor = module.weight.detach().double().cpu()
    return weight.T if isinstance(module, Conv1D) else weight


def effective_weights(model: PeftModel) -> dict[str, Tensor]:
    """W + Σ s B A over the active adapters, of every LoRA layer over a linear module."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[name] = weight_of(layer.get_base_layer())
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                A, B = (weight_of(getattr(layer, key)[adapter]) for key in ("lora_A", "lora_B"))
                found[name] = found[name] + layer.scaling[adapter] * (B @ A)
    return found


def base_state(model: Any) -> dict[str, Tensor]:
    """The base model's own tensors under the names that they had before PEFT, copied."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    adapter = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
    found = {}
    for key, value in model.state_dict().items():
        if not any(part in key for part in adapter):
            for part in (".base_layer", ".original_module", ".token_adapter"):
                key = key.replace(part, "")
            found[key] = value.clone().cpu()
    return found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains."""
    return {k: p.detach().clone().cpu() for k, p in model.named_parameters() if p.requires_grad}


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
