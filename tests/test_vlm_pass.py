"""Models that see by the engine that holds the whole model, beside float64 runs.

Their targets are the layers of the text and those of the images, whose patches are no tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PerceiverConfig, PerceiverForMaskedLM

from filet.model.beside import is_beside
from models import Case, assert_energies, energies_of, linears, peft_of
from passes import FLOAT32
from pictures import gemma3, llava, qwen2_5_vl, qwen2_vl, qwen3_vl, true_of, with_images

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [qwen2_vl, qwen2_5_vl, gemma3, llava, qwen3_vl]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_energies_of_text_and_images(kind: Any, checkpointing: bool) -> None:
    """In one padded batch, and each sample alone: one has no image, others have one or two."""
    c = kind()
    peft_model = peft_of(c)
    if checkpointing:
        peft_model.base_model.model.gradient_checkpointing_enable()
    expected = true_of(c)
    assert any("vis" in name for name in expected) and len(expected) == len(c.targets)
    assert_energies(energies_of(peft_model, [with_images(c.samples)]), expected, FLOAT32)
    if not checkpointing:
        alone = [with_images([sample]) for sample in c.samples]
        assert_energies(energies_of(peft_model, alone), expected, FLOAT32)


@pytest.mark.parametrize(("kind", "number", "longest"), [(qwen2_5_vl, 2, 14), (gemma3, 3, 16)])
def test_as_many_patches_as_tokens(kind: Any, number: int, longest: int) -> None:
    """The text's padding is none of theirs, in whatever shape they come."""
    c = kind()
    c = Case(c.model, c.samples[:number], c.targets, c.shift)
    batch = with_images(c.samples, longest)
    rows = seen_rows(c, batch)
    assert any(shape in (batch["input_ids"].shape, (number * longest,)) for shape in rows)
    assert not batch["attention_mask"].all()
    assert_energies(energies_of(peft_of(c), [batch]), true_of(c), FLOAT32)


def seen_rows(c: Case, batch: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """In what shapes the rows of the images' layers come."""
    seen: set[tuple[int, ...]] = set()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.add(tuple(args[0].shape[:-1]))

    handles = [
        c.model.get_submodule(name).register_forward_hook(hook)
        for name in c.targets
        if "vis" in name
    ]
    with torch.no_grad():
        c.model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_what_lies_beside_the_text() -> None:
    """Latents read a text's own tokens by keys across; a head reads those of the text's part."""
    c = llava()
    beside = [name for name in linears(c.model) if is_beside(c.model, name)]
    assert beside == [name for name in linears(c.model) if "vision" in name or "projector" in name]
    config = PerceiverConfig(
        num_latents=4, d_latents=8, d_model=8, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=9,
        max_position_embeddings=6,
    )  # fmt: skip
    model = PerceiverForMaskedLM(config)
    names = linears(model)
    assert any("cross_attention" in name and name.endswith("key") for name in names)
    assert not any(is_beside(model, name) for name in names)
