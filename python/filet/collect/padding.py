"""Modules whose rows no mask of the batch fits: whether padding counts there, and a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from filet.model.beside import crosses, is_key_or_value, nearest_config
from filet.system.text import some

__all__ = ["warn_of_padding", "with_padding"]


def with_padding(model: nn.Module, unmasked: Mapping[str, int]) -> list[str]:
    """Those of the modules, given so many rows, that may see what the batch's mask leaves out."""
    return sorted(name for name, rows in unmasked.items() if _is_padded(model, name, rows))


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

    Of a model with two sides, the part of images sees only what is there, as do keys and values
    across of a decoder alone; of others such parts are not asked for
    (:func:`filet.model.beside.is_beside`). Whisper's encoder is given as many frames with every
    sample.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    path = name.split(".")
    across = crosses(path) and is_key_or_value(path)
    if across and not getattr(config, "is_encoder_decoder", False):
        return False
    nearest = nearest_config(model, name)
    if type(nearest) is not type(config):
        return hasattr(nearest, "vocab_size")
    filled = rows == getattr(config, "max_source_positions", None)
    return config.get_text_config() is config and not filled
