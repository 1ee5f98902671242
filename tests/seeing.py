"""Folders of tiny models that see, with their processors; and rows of chats with images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from tokenizers_made import bpe
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaImageProcessorPil,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from models import Case, randomised
from pictures import gemma3, llava, qwen2_5_vl, qwen2_vl

_PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' }}"
    f"{{% if m['role'] == 'assistant' %}}OPEN{_PARTS}CLOSE{{% else %}}{_PARTS}{{% endif %}}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)

CASES: dict[str, Callable[[], Case]] = {
    "qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen2_5_vl, "gemma3": gemma3, "llava": llava,
}  # fmt: skip


def template(place: str, marked: bool) -> str:
    """As :data:`tokenizers_made.CHATML`, of parts; ``marked``: with the answers' marks."""
    marks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return PLAIN.replace("PLACE", place).replace("OPEN", marks[0]).replace("CLOSE", marks[1])


class Still(Qwen2VLProcessor):
    """Qwen's without videos, whose processor needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor_of(kind: str, marked: bool = False) -> Any:
    if kind == "llava":
        tokenizer = bpe(extra_special_tokens={"image_token": "<image>"})
        size: Any = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        return LlavaProcessor(
            LlavaImageProcessorPil(**size), tokenizer, patch_size=4, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", chat_template=template("<image>", marked),
        )  # fmt: skip
    if kind == "gemma3":
        names = {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }  # fmt: skip
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        tokenizer = bpe(extra_special_tokens=names)
        place = template("<start_of_image>", marked)
        return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=place)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = bpe()
    tokenizer.add_tokens(marks, special_tokens=True)
    patches: Any = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 512}
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    return Still(Qwen2VLImageProcessorPil(**patches), tokenizer, template(place, marked))


def model_of(kind: str, processor: Any) -> Any:
    """The case's, with the words of this processor."""
    plain = CASES[kind]().model
    config: Any = copy.deepcopy(plain.config)
    tokenizer = processor.tokenizer
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 256
    known = {"llava": "<image>", "gemma3": "<image_soft_token>"}
    config.image_token_id = tokenizer.convert_tokens_to_ids(known.get(kind, "<|image_pad|>"))
    if kind == "llava":
        config.image_token_index = config.image_token_id
    elif kind != "gemma3":
        config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(type(plain)(config))


def folder_of(kind: str, goal: Path, marked: bool = False) -> Any:
    """Writes model and processor; the model."""
    processor = processor_of(kind, marked)
    model = model_of(kind, processor)
    model.save_pretrained(goal)
    processor.save_pretrained(goal)
    return model


def image(number: int) -> Any:
    """Of another size for each number."""
    generator = numpy.random.default_rng(number)
    shape = (14 + 6 * (number % 3), 12 + 5 * (number % 4), 3)
    return Image.fromarray(generator.integers(256, size=shape, dtype=numpy.uint8))


def images_in(folder: Path, number: int = 4) -> list[str]:
    """Files, and their names."""
    names = [f"pictures/{each}.png" for each in range(number)]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for each, name in enumerate(names):
        image(each).save(folder / name)
    return names


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


PLACE = {"type": "image"}


def chats(names: list[Any]) -> list[dict[str, Any]]:
    """Rows with one image, with two in two turns, and without one."""
    first = turn("user", PLACE, text("What colour is the sky?"))
    blue = turn("assistant", text("It is blue."))
    again = turn("user", text("Who are you?"), PLACE)
    cat = turn("assistant", text("I am a cat."))
    alone = turn("user", text("Tell me the weather in Paris."))
    rains = turn("assistant", text("It rains."))
    return [
        {"messages": [first, blue], "images": names[:1]},
        {"messages": [first, blue, again, cat], "images": names[1:3]},
        {"messages": [alone, rains], "images": []},
        {
            "messages": [turn("system", text("hello")), again, cat, alone, rains],
            "images": names[3:],
        },
    ]


def filled(row: dict[str, Any], images: list[Any]) -> list[dict[str, Any]]:
    """The turns, with these images in their places."""
    left = list(images)
    return [
        turn(
            message["role"],
            *(part if part["type"] == "text" else {**PLACE, "image": left.pop(0)}
              for part in message["content"]),
        )
        for message in row["messages"]
    ]  # fmt: skip


def sample_of(processor: Any, turns: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the processor makes of a chat, and labels for what stands in the answers' turns."""
    made = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )  # fmt: skip
    ids = made["input_ids"][0]
    opens = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    closes = processor.tokenizer("<|im_end|>\n")["input_ids"]
    labels, place, inside = torch.full_like(ids, -100), 0, False
    while place < len(ids):
        if not inside and ids[place : place + len(opens)].tolist() == opens:
            place, inside = place + len(opens), True
            continue
        ends = inside and ids[place : place + len(closes)].tolist() == closes
        step = len(closes) if ends else 1
        if inside:
            labels[place : place + step] = ids[place : place + step]
        place, inside = place + step, inside and not ends
    rest = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}
    of_tokens = {k: v[0] for k, v in rest.items() if k.endswith("token_type_ids")}
    return {"input_ids": ids, "labels": labels, **rest, **of_tokens}
