"""The pass over the data: every batch forward and backward, its moments taken by the hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from filet.collect.hooks import MomentHooks, crosses, is_key_or_value
from filet.collect.scale import backward, loss_scale
from filet.config import FiletConfig
from filet.loss.chunked import ChunkedLoss, HeadLoss
from filet.loss.summed import ModelLoss, SummedLoss
from filet.model.batch import (
    IGNORED,
    first_samples,
    samples_in,
    tensors_in,
    to_device,
    token_masks,
    without_token_mask,
)
from filet.model.inputs import Inputs
from filet.model.targets import Target
from filet.system.memory import named_shortage
from filet.system.text import some

__all__ = ["ForwardFn", "check_terms", "collect_moments", "warn_of_padding"]

ForwardFn = Callable[[Any, Any], Any]


def collect_moments(
    peft_model: PeftModel,
    targets: dict[str, Target],
    dataloader: Iterable[Any],
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    counted: Collection[str] | None = None,
    gradient_scale: float | None = None,
    title: str = "FILet statistics",
) -> tuple[MomentHooks, dict[str, int]]:
    """Run the samples forward and backward; returns the hooks' moments and the counts.

    The model must be inside :func:`preserved`. Counts: "samples", "tokens", "loss_terms".
    ``counted``: the targets whose moments are taken, all by default. ``gradient_scale``: what an
    earlier pass over the same batches found (its hooks keep it); None finds it.
    """
    base_model = peft_model.base_model.model
    summed_loss = SummedLoss(config, base_model)
    head_loss = HeadLoss(config, peft_model, summed_loss, forward_fn)
    inputs = Inputs(base_model, forward_fn)
    model_config = getattr(base_model, "config", None)
    if forward_fn is None and getattr(model_config, "return_dict", True) is False:
        raise ValueError(
            "return_dict=False in the model's config; expected True, or a forward_fn(model, batch) "
            "that returns (loss, terms) with loss their mean"
        )
    default, forward_fn = forward_fn is None, forward_fn or _default_forward
    device = _input_device(base_model)
    is_encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
    counts = {"samples": 0, "tokens": 0, "loss_terms": 0}
    scale = gradient_scale
    index, batch = -1, None  # for the message of a shortage

    def through(host: Any, masks: dict[str, Tensor | None]) -> int:
        """One batch forward and backward; returns the terms of its loss."""
        nonlocal scale
        batch = to_device(host, device)
        given = without_token_mask(batch, config.token_mask) if default else batch
        hooks.start_batch(masks)
        hooks.phase = "forward"
        loss: ChunkedLoss | ModelLoss | None = None
        if head_loss.takes(given):
            loss = head_loss(given, host)
            hooks.phase = "idle"  # if it goes through once more, its inputs are counted already
        if loss is None:
            loss = summed_loss(forward_fn(peft_model, given), batch)
        if scale is None and loss.terms:
            scale = loss_scale(hooks, loss, index) if hooks.half else 1.0
        hooks.phase = "backward"
        hooks.gradient_scale = scale or 1.0  # none yet: no term, and every gradient is zero
        backward(loss, hooks.gradient_scale, index)
        hooks.phase = "idle"
        return loss.terms

    progress = tqdm(
        total=_expected_samples(dataloader, config.samples),
        unit="sample",
        desc=title,
        disable=not show_progress_bar,
    )
    with (
        progress,
        MomentHooks(targets, config, counted) as hooks,
        named_shortage("pass", lambda: _place(hooks, index, batch)),
    ):
        for index, batch in enumerate(dataloader):
            batch = inputs.checked(batch, index)
            if config.samples is not None:
                batch = first_samples(batch, config.samples - counts["samples"])
            size = samples_in(batch)
            if size == 0:
                continue
            masks, tokens = token_masks(batch, size, is_encoder_decoder, config.token_mask)
            if counts["samples"] == 0 and not default:
                _warn_of_other_masks(batch, config.token_mask)
            batch = summed_loss.without_padded_terms(batch, masks["decoder"])
            inputs.check_labels(batch, index, summed_loss.shift)
            terms = through(batch, masks)
            hooks.finish_batch(index, partial(through, batch, masks))
            counts["samples"] += size
            counts["tokens"] += tokens
            counts["loss_terms"] += terms
            progress.update(size)
            elapsed = progress.format_dict["elapsed"]
            if elapsed:
                progress.set_postfix_str(f"{counts['tokens'] / elapsed:,.0f} tokens/s")
            if config.samples is not None and counts["samples"] >= config.samples:
                break
        hooks.add_left_out()
        progress.total = counts["samples"]
    if counts["samples"] == 0:
        raise ValueError("the dataloader gave no sample; expected at least one")
    check_terms(counts["samples"], counts["loss_terms"])
    hooks.finish()
    for moments in hooks.moments.values():
        # Of the whole run, also for a module (an expert) that only later batches reached.
        moments.loss_terms.fill_(counts["loss_terms"])
    padded = {name for name, rows in hooks.unmasked.items() if _is_padded(base_model, name, rows)}
    warn_of_padding(sorted(padded))
    return hooks, counts


def check_terms(samples: int, terms: int) -> None:
    """An error where the loss has no term: then every gradient is zero, and every energy."""
    if not terms:
        raise ValueError(
            f"no position of the {samples} samples has a label (all labels are {IGNORED}, or stand "
            "where nothing predicts them); expected labels, of 2 tokens or more in a causal model"
        )


def warn_of_padding(unmasked: list[str]) -> None:
    if unmasked:
        warnings.warn(
            f"{some(unmasked)}: the rows of their inputs do not follow the batch's "
            "attention_mask, so padding counts there like any token; expected batches without "
            "padding (of one sample, say)",
            stacklevel=4,
        )


def _is_padded(model: nn.Module, name: str, rows: int) -> bool:
    """Whether a module that is given so many rows may see what the batch's mask leaves out.

    Beside a text's part, those of images and sounds, and what brings theirs to it (projections,
    keys and values across), see only what is there. Whisper's encoder is given as many frames with
    every sample.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    path = name.split(".")
    across = crosses(path) and is_key_or_value(path)
    if across and not getattr(config, "is_encoder_decoder", False):
        return False
    parts = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    configs: list[Any] = [getattr(part, "config", None) for part in parts]
    nearest = next(each for each in configs if hasattr(each, "get_text_config"))
    if type(nearest) is not type(config):
        return hasattr(nearest, "vocab_size")
    filled = rows == getattr(config, "max_source_positions", None)
    return config.get_text_config() is config and not filled


def _warn_of_other_masks(batch: Any, token_mask: str | None) -> None:
    """A forward_fn may know of a mask that this library does not."""
    if token_mask != "attention_mask" or not isinstance(batch, Mapping) or token_mask in batch:
        return
    others = [
        key
        for key, value in batch.items()
        if "mask" in str(key) and isinstance(value, Tensor) and value.dim() > 1
    ]
    if others:
        warnings.warn(
            f"the batch has {others[0]!r} and no attention_mask, so padding counts like any token; "
            f"expected FiletConfig(token_mask={others[0]!r}), or token_mask=None if all count",
            stacklevel=4,
        )


_PHASES = {
    "forward": "the forward of batch {}",
    "backward": "the backward of batch {}",
    "probe": "the search for the loss scale of batch {}",
}


def _place(hooks: MomentHooks, index: int, batch: Any) -> str:
    """Where the pass is, for a message."""
    if hooks.phase not in _PHASES:
        return f"the pass after batch {index}" if index >= 0 else "the pass before its first batch"
    ids = next((t for t in tensors_in(batch) if t.dim() > 1 and not t.is_floating_point()), None)
    length = "" if ids is None else f" × {ids.shape[1]} tokens"
    place = _PHASES[hooks.phase].format(index)
    samples = samples_in(batch)
    return f"{place} (counted from 0, {samples} sample{'s' * (samples != 1)}{length})"


def _default_forward(model: Any, batch: Any) -> Any:
    return model(**batch)


def _input_device(model: nn.Module) -> torch.device:
    """Where the batch goes: the device of the first parameter (the embedding's, as a rule)."""
    return next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )


def _expected_samples(dataloader: Iterable[Any], samples: int | None) -> int | None:
    dataset = getattr(dataloader, "dataset", None)
    try:
        available = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return samples
    return available if samples is None else min(samples, available)
