"""What the result of a run depends on: two runs with equal manifests are the same run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from filet.blockwise.samples import digest_of
from filet.blockwise.weights import WeightSource
from filet.config import FiletConfig
from filet.distributed.group import Group
from filet.model.checkpoint import Entry

__all__ = ["compare", "manifest_of"]

_FORMAT = "filet-run-2"


def manifest_of(
    source: WeightSource,
    data: Sequence[str],
    keep: Sequence[str],
    lora_config: LoraConfig,
    config: FiletConfig,
    weights: Sequence[Entry],
    quantised: Any,
    device: torch.device,
    statistics: bool,
    group: Group | None = None,
) -> dict[str, Any]:
    """What the result depends on. Collective: ValueError where processes differ in it.

    Not on which process has which samples, and in what batches.

    Args:
        data, keep: digests of this process's samples, of the task, and to keep, if there are any.
        quantised: the model's quantisation config, or None.
        statistics: whether they are kept of every block.
    """
    manifest = {
        "format": _FORMAT,
        "model": source.identity(),
        "dtype": str(weights[0].dtype),
        "quantised": None if quantised is None else quantised.to_dict(),
        "device": device.type,
        "data": None,  # of all processes, below
        "keep": None,
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
    if group is not None:
        group.check_same(dict(_flat(plain)))
        said = group.exchanged((data, keep))
        data, keep = ([each for its in said for each in its[which]] for which in (0, 1))
    plain |= {"data": digest_of(data), "keep": digest_of(keep) if keep else None}
    return plain


def _flat(manifest: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Its values, by their places."""
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


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
