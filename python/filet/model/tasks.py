"""What models of transformers are made for: the classes that load them, and their heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CAUSAL", "IMAGES", "SEEING", "TASKS", "Task", "task_of"]


@dataclass(frozen=True)
class Task:
    """A task of a model.

    Attributes:
        auto: class of transformers that loads a folder for it.
        ending: how names of its models' classes end.
        peft: PEFT's name for it, None where it has none.
        classifies: its head is one of classes, which a base model has not yet.
    """

    auto: str
    ending: str
    peft: str | None
    classifies: bool = False


CAUSAL, IMAGES, SEEING = "causal-lm", "image-cls", "vlm"

_GENERATION = "ForConditionalGeneration"

TASKS = {
    CAUSAL: Task("AutoModelForCausalLM", "ForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", _GENERATION, "SEQ_2_SEQ_LM"),
    "seq-cls": Task(
        "AutoModelForSequenceClassification", "ForSequenceClassification", "SEQ_CLS", True
    ),
    "token-cls": Task(
        "AutoModelForTokenClassification", "ForTokenClassification", "TOKEN_CLS", True
    ),
    "masked-lm": Task("AutoModelForMaskedLM", "ForMaskedLM", None),
    IMAGES: Task("AutoModelForImageClassification", "ForImageClassification", None, True),
    SEEING: Task("AutoModelForImageTextToText", _GENERATION, "CAUSAL_LM"),
}

# What the config of a model that takes images beside text has, one or the other.
_OF_IMAGES = {"vision_config", "image_token_id", "image_token_index"}


def task_of(folder: Path) -> str:
    """The task that a folder's config.json names by its class; a causal model's where it does not.

    Whether the model can do that is asked where it is loaded.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return CAUSAL  # transformers says what is wrong with it
    config = config if isinstance(config, Mapping) else {}
    for name in config.get("architectures") or ():
        if str(name).endswith(_GENERATION):
            # Models that see have the name of those that translate.
            if config.get("is_encoder_decoder") is True:
                return "seq2seq-lm"
            return SEEING if config.keys() & _OF_IMAGES else CAUSAL
        for task, its in TASKS.items():
            if str(name).endswith(its.ending):
                return task
    return CAUSAL
