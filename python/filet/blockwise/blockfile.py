"""A finished block, in memory and as a file of the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

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

    def with_others(self, contents: Sequence[Tensor]) -> Finished:
        """With what other processes chose in the block, as :meth:`content` has it."""
        choice, unmasked = Choice(), set(self.unmasked)
        for each in (self, *(self._read(self.block, raw) for raw in contents)):
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
            return cls._of(block, metadata, set(file.keys()), file.get_tensor)

    @classmethod
    def _read(cls, block: int, raw: Tensor) -> Finished:
        """From the bytes of :meth:`content`."""
        content: bytes = raw.numpy().tobytes()
        size = int.from_bytes(content[:8], "little")
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        return cls._of(block, metadata, tensors.keys(), tensors.__getitem__)

    @classmethod
    def _of(
        cls, block: int, metadata: Mapping[str, str], there: Set[str], tensor: Callable[[str], Any]
    ) -> Finished:
        choice = Choice(left_default=json.loads(metadata["left_default"]))
        for row in json.loads(metadata["modules"]):
            name, fingerprint = row["name"], row.pop("fingerprint")
            B = tensor(f"{name}.B") if f"{name}.B" in there else None
            choice.layers[name] = Layer(tensor(f"{name}.A"), B, fingerprint)
            choice.reports[name] = ModuleReport.of_parts(tensor, row)
        return cls(block, choice, json.loads(metadata["unmasked"]))
