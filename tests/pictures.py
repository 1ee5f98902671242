"""Models of pictures and text, whose batches have tensors with rows that are no samples."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from models import VOCAB, Case, linears, randomised, true_energies

_TEXT = {
    "vocab_size": VOCAB + 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

_IMAGE, _START, _END = VOCAB, VOCAB + 1, VOCAB + 2  # tokens


def _seeded(kind: type[nn.Module], config: Any) -> Any:
    """Also what :func:`randomised` only adds to: of other weights a router chose other rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(kind(config))


@functools.cache
def qwen2_vl() -> Case:
    """Images as patches of all samples in one tensor, two of four images in the first sample."""
    config = Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE},
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
    return Case(model, samples, linears(model, "lm_head"), shift=True)


@functools.cache
def qwen2_5_vl() -> Case:
    """As :func:`qwen2_vl`, with windows of patches: those of a 4 x 4 image lie in four."""
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
            "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "in_channels": 3, "window_size": 8, "fullatt_block_indexes": [1],
        },
        image_token_id=_IMAGE, vision_start_token_id=_START, vision_end_token_id=_END,
    )  # fmt: skip
    model = _seeded(Qwen2_5_VLForConditionalGeneration, config)
    return Case(model, _patched([[(4, 4)], [(2, 2), (2, 4)]]), linears(model, "lm_head"), True)


@functools.cache
def qwen3_vl() -> Case:
    """What its first block makes gets images of a lower layer added."""
    config = Qwen3VLConfig(
        text_config={**_TEXT, "num_hidden_layers": 2, "head_dim": 8, "rope_parameters": _ROPE},
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
            "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "in_channels": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=_IMAGE, vision_start_token_id=_START, vision_end_token_id=_END,
    )  # fmt: skip
    model = _seeded(Qwen3VLForConditionalGeneration, config)
    return Case(model, _patched([[(4, 4)], [(2, 2), (2, 4)]]), linears(model, "lm_head"), True)


@functools.cache
def gemma3() -> Case:
    """The tokens of an image see each other both ways; two layers, of which one sees a window."""
    config = Gemma3Config(
        text_config={
            **_TEXT, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_use_head": False,
        },
        mm_tokens_per_image=4, image_token_id=_IMAGE, boi_token_index=_START, eoi_token_index=_END,
    )  # fmt: skip
    model = _seeded(Gemma3ForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (1, 2, 0):
        ids = [3, *[_START, *[_IMAGE] * 4, _END] * images, 4, 5, 6]
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
            "token_type_ids": torch.tensor([int(i == _IMAGE) for i in ids]),
        }
        if images:
            sample["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        samples.append(sample)
    return Case(model, samples, linears(model, "lm_head"), True)


def _patched(grids: list[list[tuple[int, int]]]) -> list[dict[str, Tensor]]:
    """Samples of Qwen's with images of so many patches, and one without."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for sizes in [*grids, []]:
        ids = [3]
        for height, width in sizes:
            ids += [_START, *[_IMAGE] * (height * width // 4), _END]
        ids += [4, 5, 6, 7][: 4 - len(sizes)]
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
            "mm_token_type_ids": torch.tensor([int(i == _IMAGE) for i in ids]),
        }
        if sizes:
            patches = sum(height * width for height, width in sizes)
            sample["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
            sample["image_grid_thw"] = torch.tensor([[1, *size] for size in sizes])
        samples.append(sample)
    return samples


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
    return Case(model, samples, linears(model, "lm_head"), shift=True)


def with_images(samples: list[dict[str, Tensor]], longest: int | None = None) -> dict[str, Tensor]:
    """A padded batch, as long as the longest sample or longer."""
    longest = longest or max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, Tensor] = {}
    for key in ("input_ids", "labels", "mm_token_type_ids", "token_type_ids"):
        if key in samples[0]:
            fill = -100 if key == "labels" else 0
            batch[key] = torch.stack(
                [nn.functional.pad(s[key], (0, longest - len(s[key])), value=fill) for s in samples]
            )
    batch["attention_mask"] = torch.stack(
        [(torch.arange(longest) < len(s["input_ids"])).long() for s in samples]
    )
    for key in ("pixel_values", "image_grid_thw"):
        if any(key in sample for sample in samples):
            batch[key] = torch.cat([s[key] for s in samples if key in s])
    return batch


def true_of(c: Case) -> dict[str, Tensor]:
    """The energies of all targets in float64, each sample alone and without padding."""
    return true_energies(c.model, c.targets, c.samples, True, batch_of=lambda s: with_images([s]))
