"""Initialisations by PEFT's own code: run on a fresh model, then A and B read from its layers.

Where PEFT takes B A out of the base weight, W_res = W − B A, the start subtracts it beside W.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from typing import Any

import torch
from peft import EvaConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import eva
from peft.tuners.lora.config import CordaConfig, KasaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from effect.context import Context
from effect.moments import Batch, as_one_sample, counted_tokens, joined, without_labels
from effect.start import Start

__all__ = ["BY_PEFT", "adapted", "factors_in", "starts_of"]

# LoRA's settings of what PEFT makes of the weights alone.
_OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},  # neither A nor B is 0, but B A is
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
# Adapters of another kind, see :mod:`effect.variants`.
_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": KasaConfig()},
}
BY_PEFT = (*_OF_WEIGHTS, "eva", "corda-kpm", "corda-ipm", "lora-ga")
_SUBTRACTING = ("pissa", "olora", "corda-kpm", "corda-ipm", "lora-ga")


def starts_of(context: Context, method: str) -> dict[str, Start]:
    """What PEFT makes of the layers, one of :data:`BY_PEFT`."""
    subtracting = method in _SUBTRACTING
    return {
        name: Start(A, B, A, B) if subtracting else Start(A, B)
        for name, (A, B) in factors_in(adapted(context, method)).items()
    }


def factors_in(peft_model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of A and B of every layer of the adapter, by the layers' names in the base model."""
    return {
        name: (
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
        )
        for name, layer in peft_model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }


def adapted(context: Context, method: str) -> Any:
    """PEFT's model at the start of ``method``: of :data:`BY_PEFT`, or "dora" or "kasa".

    The same for the same seed; the random state comes back as it was.
    """
    device = next(context.base.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        # Of EVA's memory, and of the first layer's hook in LoRA-GA, whose weight has its gradient.
        warnings.filterwarnings("ignore", "lora with eva initialization|Full backward hook")
        torch.manual_seed(context.seed)
        settings = {**_OF_WEIGHTS, **_VARIANTS}.get(method)
        if settings is not None:
            return get_peft_model(context.load(), context.config(**settings))
        if method == "eva":
            return _eva(context)
        if method == "lora-ga":
            return _lora_ga(context)
        return _corda(context, method.removeprefix("corda-"))


def _eva(context: Context) -> Any:
    """EVA: A has the top right singular vectors of the layer's inputs, B = 0 (arXiv 2410.07170).

    rho=1 redistributes no ranks. Of a language model the labelled tokens alone are looked at, which
    is PEFT's default; of text with one label, those that are no padding; of images all.

    PEFT goes over the batches until no component of any layer turns from one to the next, which of
    two small ones took five minutes. Here all samples are one batch, so that they do not turn. Less
    than r tokens come before it: PEFT hashes every layer's inputs of the first batch in Python, and
    leaves a batch out of the components that has less rows than those.
    """
    batch = context.batches[0]
    tokens = "input_ids" in batch
    labelled = tokens and batch["labels"].shape == batch["input_ids"].shape
    config = EvaConfig(rho=1.0, use_label_mask=labelled)
    model = get_peft_model(
        context.load(), context.config(init_lora_weights="eva", eva_config=config)
    )
    first = {key: value[:1] for key, value in batch.items()}
    # Where a model can do without logits, those of all samples are not made.
    free = "logits_to_keep" in inspect.signature(context.base.forward).parameters
    more: dict[str, Any] = {"logits_to_keep": 1} if free else {}

    def counted(batch: Batch, config: Any) -> Tensor:
        found = eva.prepare_model_inputs_fn_language_modeling(batch, config)
        is_first = batch["input_ids"] is first["input_ids"]
        return found[: context.rank - 1] if is_first else found

    with contextlib.redirect_stdout(io.StringIO()):  # on which it says what it leaves out
        initialize_lora_eva_weights(
            model,
            [first, joined(context.batches)],
            forward_fn=lambda model, batch: model(**without_labels(batch), **more),
            prepare_model_inputs_fn=counted if tokens else None,
            prepare_layer_inputs_fn=(
                eva.prepare_layer_inputs_fn_language_modeling if tokens else None
            ),
            show_progress_bar=False,
        )
    return model


def _lora_ga(context: Context) -> Any:
    """LoRA-GA with PEFT's default direction and scale (arXiv 2407.05000)."""
    model = context.load()
    config = context.config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step() -> None:
        for batch in context.batches:
            context.loss_fn(model, batch)[0].backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def _corda(context: Context, mode: str) -> Any:
    """CorDA by the covariance of inputs (arXiv 2406.05223).

    "ipm" learns in the directions with the largest response to the task's data; "kpm" leaves those
    with the largest response to the data to keep alone, where there are such data (the paper's is
    question answering), and to the task's where there are none. PEFT takes one sample at a time,
    which the paper makes of 2048 tokens. Here a batch's tokens are one sample.
    """
    batches = (mode == "kpm" and context.keep) or context.batches
    model = context.load()
    settings = {"corda_config": CordaConfig(corda_method=mode)}
    config = context.config(init_lora_weights="corda", **settings)

    def run_model() -> None:
        for batch in batches:
            _forward(context, model, batch)

    preprocess_corda(model, config, run_model)
    return get_peft_model(model, config)


def _forward(context: Context, model: Any, batch: Batch) -> None:
    with as_one_sample(context.layers_of(model), counted_tokens(batch)):
        model(**without_labels(batch))
