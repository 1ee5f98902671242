"""Which rows of a module's inputs and gradients count, and their sum."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from filet.model.beside import crosses, is_key_or_value
from filet_kernels import SecondMoment, syrk_

__all__ = ["Rows"]


class Rows:
    """Adds the rows of a batch to moments, those of its tokens that count.

    Attributes:
        counting: whether anything is added.
        unmasked: modules whose rows the attention mask could not be put to, and how many of a
            sample.
    """

    def __init__(self, beside: Collection[str] = ()) -> None:
        """``beside``: modules whose rows are no tokens, so that no mask is for them."""
        self.counting = True
        self._beside = beside
        self.unmasked: dict[str, int] = {}
        self._masks: dict[str, Tensor | None] = {}
        self._mask_counts: dict[str, int] = {}
        # Rows of each moment. On the host: 9 additions a block and batch would be 9 launches.
        self._counted: dict[int, tuple[SecondMoment, int]] = {}

    def start_batch(self, masks: dict[str, Tensor | None]) -> None:
        """``masks`` (B, T) of the tokens to count: "encoder" and "decoder"; None counts all."""
        self._masks = masks
        self._mask_counts = {k: int(m.sum()) for k, m in masks.items() if m is not None}

    def of(self, name: str, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """v of a module as rows (…, T, d) that :func:`syrk_` takes, and which of them count."""
        rows = v.unsqueeze(0) if v.dim() == 1 else v if v.dim() <= 3 else v.flatten(0, -2)
        side = self._side(name)
        mask = self._masks.get(side)
        if mask is None or name in self._beside:
            return rows, None
        if mask.device != v.device:
            self._masks[side] = mask = mask.to(v.device, non_blocking=True)
        if rows.shape[:-1] == mask.shape:
            return rows, mask
        if rows.shape[:-1] == (mask.numel(),):
            return rows, mask.flatten()
        if rows.shape[:-1] != mask.shape[:1]:  # one row a sample (a pooler) always counts
            self.unmasked[name] = rows.shape[-2]
        return rows, None

    def add(self, name: str, moment: SecondMoment, v: Tensor, *, alpha: float = 1.0) -> None:
        """Add a module's rows v to a moment. Mutates ``moment.sum``; the count follows later."""
        if not self.counting:
            return
        rows, weights = self.of(name, v)
        count = rows.shape[:-1].numel()
        if weights is not None:
            count = self._mask_counts[self._side(name)]
        self._counted[id(moment)] = (moment, self._counted.get(id(moment), (moment, 0))[1] + count)
        device = moment.sum.device
        if rows.device != device:
            rows, weights = rows.to(device), None if weights is None else weights.to(device)
        with torch.no_grad():
            syrk_(moment.sum, rows, alpha=alpha, weights=weights)

    def finish(self) -> None:
        """Write the counts into the moments."""
        for moment, count in self._counted.values():
            moment.count += count
        self._counted.clear()

    def _side(self, name: str) -> str:
        """Whose tokens a module of an encoder-decoder sees; "decoder" where there is one side."""
        if "encoder" not in self._masks:
            return "decoder"
        parts = name.split(".")
        if crosses(parts):
            return "encoder" if is_key_or_value(parts) else "decoder"
        return "encoder" if "encoder" in parts and "decoder" not in parts else "decoder"
