"""What the result of a run depends on: two runs with equal manifests are the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from filet.blockwise.batches import Batch
from filet.blockwise.weights import WeightSource
from filet.config import FiletConfig
from filet.model.checkpoint import Entry

__all__ = ["compare", "manifest_of"]

_FORMAT = "filet-run-1"


def manifest_of(
    source: WeightSource,
    batches: Sequence[Batch],
    keep: Sequence[Batch],
    lora_config: LoraConfig,
    config: FiletConfig,
    weights: Sequence[Entry],
    quantised: Any,
    device: torch.device,
    statistics: bool,
) -> dict[str, Any]:
    """What the result depends on.

    ``keep``: data to keep, if there is any. ``quantised``: the model's quantisation config, or
    None. ``statistics``: whether they are kept of every block.
    """
    manifest = {
        "format": _FORMAT,
        "model": source.identity(),
        "dtype": str(weights[0].dtype),
        "quantised": None if quantised is None else quantised.to_dict(),
        "device": device.type,
        "data": _digest(batches),
        "keep": _digest(keep) if keep else None,
        "statistics": statistics or None,
        "settings": dataclasses.asdict(config),
        "adapter": {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in lora_config.to_dict().items()
            if key not in ("base_model_name_or_path", "auto_mapping", "peft_version")
        },
    }
    # As it will be read back.
    plain: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
    return plain


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        own = {"rows": batch.rows, "labels": batch.labels, "tokens that count": batch.mask}
        for key, value in sorted({**batch.inputs, **own}.items()):
            digest.update(f"{key}:{getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compare(there: Any, now: Any, folder: Path, where: str = "") -> None:
    """ValueError naming the first difference of two manifests."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in there if key not in now)]:
            compare(there.get(key), now.get(key), folder, f"{where}{'.' if where else ''}{key}")
    elif there != now:
        raise ValueError(
            f"{folder} holds a run that was not finished and that is not this one: {where} is "
            f"{there!r} there and {now!r} now; expected the same to resume it, or the folder "
            "removed to begin anew"
        )
