"""Models of pictures and text, whose batches have tensors with rows that are no samples."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from models import VOCAB, Case, linears, randomised

_TEXT = {
    "vocab_size": VOCAB + 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_IMAGE, _START, _END = VOCAB, VOCAB + 1, VOCAB + 2  # tokens


def _seeded(kind: type[nn.Module], config: Any) -> Any:
    """Also what :func:`randomised` only adds to: of other weights a router chose other rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(kind(config))


@functools.cache
def qwen2_vl() -> Case:
    """Images as patches of all samples in one tensor, two of four images in the first sample."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2, "in_channels": 3,
        },
        image_token_id=_IMAGE, vision_start_token_id=_START, vision_end_token_id=_END,
    )  # fmt: skip
    model = _seeded(Qwen2VLForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (2, 1, 1):
        ids = [3, *[_START, _IMAGE, _END] * images, 4, 5, 6]
        samples.append(
            {
                "input_ids": torch.tensor(ids),
                "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
                "pixel_values": torch.randn(4 * images, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
                "mm_token_type_ids": torch.tensor([int(i == _IMAGE) for i in ids]),
            }
        )
    targets = [name for name in linears(model, "lm_head") if "language_model" in name]
    return Case(model, samples, targets, shift=True)


@functools.cache
def llava() -> Case:
    """As many images as samples, but two are of the first and none of the second."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        },
        image_token_index=_IMAGE, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = _seeded(LlavaForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (2, 0):
        ids = [3, *[_IMAGE] * 4 * images, 4, 5, 6]
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
        }
        if images:
            sample["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
        samples.append(sample)
    targets = [name for name in linears(model, "lm_head") if "language_model" in name]
    return Case(model, samples, targets, shift=True)


def with_images(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, Tensor] = {}
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        if key in samples[0]:
            fill = -100 if key == "labels" else 0
            batch[key] = torch.stack(
                [nn.functional.pad(s[key], (0, longest - len(s[key])), value=fill) for s in samples]
            )
    batch["attention_mask"] = torch.stack(
        [(torch.arange(longest) < len(s["input_ids"])).long() for s in samples]
    )
    for key in ("pixel_values", "image_grid_thw"):
        if key in samples[0]:
            batch[key] = torch.cat([s[key] for s in samples if key in s])
    return batch
