"""A finished block, in memory and as a file of the run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from filet.distributed.group import Group
from filet.report.modules import ModuleReport
from filet.select import Choice, Layer

__all__ = ["Finished"]

_FORMAT = "filet-block-1"


@dataclass(eq=False)
class Finished:
    """What was chosen in a block, in host memory."""

    block: int
    choice: Choice
    unmasked: list[str]

    def gathered(self, group: Group) -> Finished:
        """With what the other processes chose in the block, in the first one. Collective."""
        choice, unmasked = Choice(), set()
        for each in group.gathered(self):
            choice.layers |= each.choice.layers
            choice.reports |= each.choice.reports
            choice.left_default |= each.choice.left_default
            unmasked.update(each.unmasked)
        return Finished(self.block, choice, sorted(unmasked))

    def content(self) -> bytes:
        """Of the block's file: A, B if there is one, energies and indices, the rest as JSON."""
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for name, layer in self.choice.layers.items():
            its_tensors, row = self.choice.reports[name].parts()
            tensors |= {**its_tensors, f"{name}.A": layer.A0}
            if layer.B0 is not None:
                tensors[f"{name}.B"] = layer.B0
            rows.append({"fingerprint": layer.fingerprint, **row})
        metadata = {
            "format": _FORMAT,
            "modules": json.dumps(rows),
            "left_default": json.dumps(self.choice.left_default),
            "unmasked": json.dumps(self.unmasked),
        }
        return save(tensors, metadata)

    @classmethod
    def load(cls, path: Path, block: int) -> Finished:
        """From the block's file; ValueError for one of another format."""
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path}: format {metadata.get('format')!r}; expected {_FORMAT!r}")
            choice, there = Choice(left_default=json.loads(metadata["left_default"])), file.keys()
            for row in json.loads(metadata["modules"]):
                name, fingerprint = row["name"], row.pop("fingerprint")
                B = file.get_tensor(f"{name}.B") if f"{name}.B" in there else None
                choice.layers[name] = Layer(file.get_tensor(f"{name}.A"), B, fingerprint)
                choice.reports[name] = ModuleReport.of_parts(file.get_tensor, row)
        return cls(block, choice, json.loads(metadata["unmasked"]))
