"""The model of a run in parts: its blocks, and the targets and weights of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig

from filet.blockwise.folder import ADAPTER, check_alone
from filet.model.chain import Parts
from filet.model.checkpoint import Entry, entries
from filet.model.targets import Target, adapted, check_targets, find_targets
from filet.select import check_rank
from filet.system.names import split

__all__ = ["PartedModel"]


class PartedModel:
    """A model on the meta device, with an adapter, by blocks.

    Attributes:
        entries: all its weights.
        peft_model: with the adapter, :data:`~filet.blockwise.folder.ADAPTER`.
        base: the model inside.
        targets, unsupported: as :func:`filet.model.targets.find_targets` has them.
        parts: what runs its blocks, and what is before and after them.
        number: of blocks.
        first: the first block with a target; below it no gradient is needed.
        of_block: the targets of each block.
        weights, others: the weights of each block, and those of no block.
    """

    def __init__(self, model: Any, lora_config: LoraConfig, device: torch.device) -> None:
        """Raises ValueError for a model, adapter or targets that the engine does not take."""
        check_alone(lora_config)
        self.entries = entries(model)  # before PEFT renames them
        self.peft_model = adapted(model, lora_config)
        self.base = self.peft_model.base_model.model
        self.targets, self.unsupported = find_targets(self.peft_model, ADAPTER, loaded=False)
        check_targets(self.peft_model, self.targets, self.unsupported, ADAPTER)
        for target in self.targets.values():
            check_rank(target, target.shape[1])
        self.parts = Parts(self.base, self.targets, self.unsupported)
        self.number = len(self.parts.blocks)
        self.weights, self.others = self._weights(self.entries)
        self.of_block: list[dict[str, Target]] = [{} for _ in range(self.number)]
        for name, target in self.targets.items():
            self.of_block[self._block_of(name)][name] = target
        self.first = min(index for index, mine in enumerate(self.of_block) if mine)
        for module in self.base.modules():
            for key, value in module._buffers.items():
                if value is not None and value.device.type != "meta":
                    module._buffers[key] = value.to(device)

    def _weights(self, weights: Sequence[Entry]) -> tuple[list[list[Entry]], list[Entry]]:
        """Weights by block, and those of no block."""
        of_block: list[list[Entry]] = [[] for _ in range(self.number)]
        others: list[Entry] = []
        for entry in weights:
            homes = {self._block_of(name) for name in entry.names}
            if len(homes) > 1:
                raise ValueError(
                    f"a weight is shared between blocks ({', '.join(entry.names)}); the blockwise "
                    "engine takes blocks with weights of their own"
                )
            home = homes.pop()
            (others if home < 0 else of_block[home]).append(entry)
        return of_block, others

    def _block_of(self, name: str) -> int:
        """The block a module or weight lies in, -1 for none."""
        index = split(name, self.parts.path).index
        return -1 if index is None else index
