"""What was chosen for one layer, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["ModuleReport"]

_TENSORS = ("energies", "indices")  # the fields that are not JSON


@dataclass(frozen=True, eq=False)
class ModuleReport:
    """The outcome for one linear layer ``y = W x``, ``W`` of shape (m, n) = (out, in).

    Attributes:
        name: module path relative to the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        shape: (m, n) = (out, in) of ``W``.
        rank: number of directions chosen, the LoRA rank of this module.
        energies: (n,) float64, CPU. The Fisher energy of every direction; NaN where the direction
            is not a candidate (its column of ``W`` is zero). Never negative, possibly zero.
        indices: (rank,) int64, CPU. The chosen directions.
        input_space: ``"x"`` or ``"y"``, where the second moment of the input side was taken.
        output_space: ``"g"`` or ``"h"``, where the second moment of the output side was taken.
        input_tokens: positions counted in the input side's moment.
        output_tokens: positions counted in the output side's moment.
        shared_input: module whose input second moment this one shares, or None.
        kind: ``"energy"``, or ``"contrast"``: then ``energies`` are the eigenvalues of the chosen
            directions alone, of task against keep, and ``indices`` count them.
        keep_tokens: positions of the data to keep counted in its moment; None for ``"energy"``.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energies: torch.Tensor
    indices: torch.Tensor
    input_space: str
    output_space: str
    input_tokens: int
    output_tokens: int
    shared_input: str | None
    kind: str = "energy"  # reports of 0.1 do not say it
    keep_tokens: int | None = None

    def chosen(self) -> torch.Tensor:
        """Energies of the chosen directions, (rank,) float64, in the order of ``indices``."""
        return self.energies[self.indices]

    def candidates(self) -> torch.Tensor:
        """Energies of every candidate direction (finite ones), (<= n,) float64."""
        return self.energies[torch.isfinite(self.energies)]

    def parts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a file has of it: tensors, "<name>.energies" and "<name>.indices", and JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{self.name}.{key}": values.pop(key) for key in _TENSORS}, values

    @classmethod
    def of_parts(
        cls, tensor: Callable[[str], torch.Tensor], values: Mapping[str, Any]
    ) -> ModuleReport:
        """From what :meth:`parts` gave; ``tensor`` gives one by its name in the file."""
        tensors = {key: tensor(f"{values['name']}.{key}") for key in _TENSORS}
        return cls(**{**values, **tensors, "shape": tuple(values["shape"])})
