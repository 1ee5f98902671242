"""Text drawn from a causal language model itself: what it was trained on, where that is not had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from filet.config import FiletConfig
from filet.loss.sampling import drawn
from filet.model.inputs import Inputs

__all__ = ["SELF_TOKENS", "check_samples_text", "sampled_text"]

SELF_TOKENS = 256
"""Of a sample of the model's own text, the one it begins with included."""

# What the models of transformers call it, and those of before 5.24.
_CACHES = ("cache", "past_key_values")

_TOGETHER = 32  # samples drawn at a time, and in a batch
_DEFAULT_SAMPLES = 320  # where ``config.samples`` sets no end


def check_samples_text(model: Any) -> int:
    """The token with which a text of this model begins; ValueError where it writes none."""
    if not Inputs(model).shift or not getattr(model, "can_generate", lambda: False)():
        raise ValueError(
            f"keep='self': {type(model).__name__} is no causal language model that generates; "
            "expected batches of what is not to be forgotten"
        )
    text, words = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    places = [text, getattr(model, "generation_config", None)]
    for key in ("bos_token_id", "eos_token_id"):  # some begin with the one that ends the last text
        for place in places:
            token = getattr(place, key, None)
            token = token[0] if isinstance(token, list) else token
            if token is not None and not 0 <= int(token) < words:
                raise ValueError(
                    f"keep='self': {key}={int(token)} in the model's config, with which a text "
                    f"begins, is none of its {words} words; expected one of them, or batches of "
                    "what is not to be forgotten"
                )
            if token is not None:
                return int(token)
    raise ValueError(
        "keep='self': no bos_token_id or eos_token_id in the model's config to begin a text with; "
        "expected one, or batches of what is not to be forgotten"
    )


@torch.no_grad()
def sampled_text(
    peft_model: Any,
    config: FiletConfig,
    rank: int = 0,
    size: int = 1,
    in_step: bool = False,
) -> list[dict[str, Tensor]]:
    """``config.samples`` samples of :data:`SELF_TOKENS` tokens, as batches on the CPU.

    Each token is drawn from the model's own distribution (temperature 1, nothing cut off) but for
    those that end a text, so that all are as long. By a generator of its own, seeded with
    ``config.seed``: no random state of the process is read or changed. The model is run as it is:
    inside :func:`filet.model.isolation.preserved` in evaluation, without what the adapter adds.
    Of ``size`` processes each draws every ``size``-th batch, one of ``rank`` beginning there; all
    together have what one would draw. ``in_step``: they run the model together, equally often.
    """
    model = peft_model.base_model.model
    first = check_samples_text(model)
    longest = min(SELF_TOKENS, Inputs(model).longest or SELF_TOKENS)
    generator = torch.Generator().manual_seed(config.seed)
    samples = config.samples or _DEFAULT_SAMPLES
    device = model.get_input_embeddings().weight.device
    batches: list[dict[str, Tensor]] = []
    total = -(-samples // _TOGETHER)
    for start in range(0, samples, _TOGETHER):
        number = min(_TOGETHER, samples - start)
        how: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        shares = torch.rand(number, longest - 1, **how)
        index = start // _TOGETHER
        mine = index % size == rank
        idle = in_step and index % size == 0 and index + rank >= total  # the last round is shorter
        if not mine and not idle:
            continue
        begun = torch.full((number, 1), first, dtype=torch.int64, device=device)
        ids = _continued(peft_model, begun, shares).cpu()
        if mine:
            batches.append({"input_ids": ids, "labels": ids})
    return batches


def _continued(peft_model: Any, ids: Tensor, shares: Tensor) -> Tensor:
    """ids (B, 1) and a token for each column of ``shares`` (B, T), in [0, 1), by which it falls."""
    model = peft_model.base_model.model
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    cache: dict[str, Any] = {}
    for share in shares.to(ids.device).split(1, dim=1):
        # A model without a cache (or whose checkpointing forbids one) is given all of it anew.
        output = peft_model(input_ids=ids[:, -1:] if cache else ids, use_cache=True, **cache)
        cache = next(({name: output[name]} for name in _CACHES if output.get(name)), {})
        logits = output.logits[:, -1].float()
        # What is no word of the model's is never drawn.
        logits[:, [end for end in ends if 0 <= end < logits.shape[-1]]] = -torch.inf
        ids = torch.cat([ids, drawn(logits, share.to(logits.device)).unsqueeze(1).to(ids)], 1)
    return ids
