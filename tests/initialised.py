"""What tests of the initialisation share: the call, the weights it wrote, and the card's code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from filet import FiletConfig, FiletReport, initialize_lora_filet_weights
from models import case, collate, loader

# A0 and B0 as the paper writes them, with a frozen half that subtracts their product.
UNTOUCHED = {"start": "untouched", "normalization": "mean", "orthogonal": False}

# Factors this large change the function by its own size: a wrong s or sign cannot hide.
LOUD = {**UNTOUCHED, "scaling": "singular"}


def initialized(peft_model: PeftModel, batches: Any = None, **config: Any) -> FiletReport:
    adapter = config.pop("adapter_name", "default")
    forward_fn, keep = config.pop("forward_fn", None), config.pop("keep", None)
    return initialize_lora_filet_weights(
        peft_model,
        loader(case("llama").samples) if batches is None else batches,
        FiletConfig(**{"samples": None, **config}),
        adapter_name=adapter,
        forward_fn=forward_fn,
        show_progress_bar=False,
        keep=keep,
    )


def layer_of(peft_model: PeftModel, name: str) -> Any:
    return peft_model.base_model.model.get_submodule(name)


def weights(peft_model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in peft_model.named_parameters()}


def base_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    return {name: w for name, w in weights(peft_model).items() if ".lora_" not in name}


def assert_bitwise(peft_model: PeftModel, before: dict[str, Tensor]) -> None:
    after = weights(peft_model)
    assert after.keys() == before.keys()
    for name in before:
        assert torch.equal(after[name], before[name]), name


def never() -> Iterator[Any]:
    raise AssertionError("the data were read before the arguments were checked")
    yield


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    model.eval()
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in collate(case("llama").samples).items()}
    logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"] == 1].float()


def halves_of(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and A0, B0 in float64, from what PEFT sees: [A; A0] and [B, −B0]."""
    whole_A, whole_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    A, A0 = whole_A.detach().cpu().double().chunk(2)
    B, minus_B0 = whole_B.detach().cpu().double().chunk(2, 1)
    return A, B, A0, -minus_B0


def warnings_of(peft_model: PeftModel, *args: Any, **config: Any) -> tuple[FiletReport, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = initialized(peft_model, *args, **config)
    return report, [str(w.message) for w in caught if "default LoRA init" in str(w.message)]


def code_of(card: str, folder: Path) -> str:
    """The code of a model card, of its own folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code.replace('folder = "..."', f"folder = {str(folder)!r}")


def run(code: str) -> PeftModel:
    """What it makes."""
    names: dict[str, Any] = {}
    exec(code, names)
    model: PeftModel = names["model"]
    return model
