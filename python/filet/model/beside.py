"""What lies beside the text of a model: its parts for images and sounds, and what these go through.

Patches and frames are no tokens: the batch's mask says nothing of them, even where there happen to
be as many.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["crosses", "is_beside", "is_key_or_value", "nearest_config", "text_path"]


def is_beside(model: Any, path: str) -> bool:
    """Whether a module's rows are no tokens of the text that the model goes on with.

    They are not in a part with a config of its own and no words in it; nor, of a model with a part
    for its text, in what lies between the two (a projection) and at keys and values across. Of
    encoder-decoders the two sides say more (:mod:`filet.collect.rows`).
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return False
    composed = config.get_text_config() is not config
    parts = path.split(".")
    if composed and crosses(parts) and is_key_or_value(parts):
        return True
    nearest = nearest_config(model, path)
    if type(nearest) is not type(config):
        return not hasattr(nearest, "vocab_size")
    return composed and path.startswith(f"{getattr(model, 'base_model_prefix', '')}.")


def nearest_config(model: Any, path: str) -> Any:
    """The config of the innermost part that has one and that a module lies in; else the model's."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        found = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if hasattr(found, "get_text_config"):
            return found
    return model.config


def text_path(model: Any) -> str | None:
    """Where the part of a model lies that goes on with the text; None where it has no other."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config:
        return None
    named: list[tuple[str, nn.Module]] = list(model.named_modules())
    found = (path for path, module in named if type(getattr(module, "config", None)) is type(text))
    return next(found, None)


def crosses(parts: list[str]) -> bool:
    """Whether a module's path is one of cross-attention."""
    return any(word in part for part in parts for word in ("EncDec", "encoder_attn", "cross"))


def is_key_or_value(parts: list[str]) -> bool:
    return parts[-1].lower()[:1] in ("k", "v")
