"""The model of a run in parts: its blocks, and the targets and weights of each."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from filet.blockwise.folder import ADAPTER, check_alone
from filet.model.beside import text_path
from filet.model.chain import Parts
from filet.model.checkpoint import Entry, entries
from filet.model.targets import Target, adapted, check_targets, find_targets
from filet.select import check_rank
from filet.system.names import split
from filet.system.text import some

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
        self.peft_model = adapted(model, _of_text(model, lora_config))
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


def _of_text(model: Any, lora_config: LoraConfig) -> LoraConfig:
    """A config whose targets lie in the part of a model that goes on with the text.

    That of images runs before the blocks, once, and is no chain of these. A warning says that its
    layers are left out. Raises ValueError for names that only others than the text's layers have.
    """
    path = text_path(model)
    if path is None:
        return lora_config
    names = lora_config.target_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{path}.")]
    wanted = {names} if isinstance(names, str) else set(names or ())
    for name in sorted(wanted - {"all-linear"}):
        if any(_matches(name, each, names) for each in linear) and not any(
            _matches(name, each, names) for each in inside
        ):
            raise ValueError(
                f"target_modules has {name!r}, of no layer in {path}; the blockwise engine takes "
                "layers of the text's blocks only: expected target_modules without (or "
                "engine='memory')"
            )
    every = wanted == {"all-linear"}
    head = model.get_output_embeddings() if every else None  # it is none of all
    left = [
        name
        for name in linear
        if name not in inside
        and model.get_submodule(name) is not head
        and (every or any(_matches(each, name, names) for each in wanted))
    ]
    if not left:
        return lora_config
    warnings.warn(
        f"{some(left)}: beside the text's blocks, whose layers alone the blockwise engine adapts "
        "(engine='memory' adapts these as well)",
        stacklevel=2,
    )
    config = copy.copy(lora_config)
    others = lora_config.exclude_modules or "(?!)"
    if not isinstance(others, str):
        others = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(others)))})"
    config.exclude_modules = rf"{others}|(?!{re.escape(path)}\.).*"
    return config


def _matches(name: str, path: str, names: Any) -> bool:
    """Whether PEFT takes a module for one that ``name``, of ``names``, is of."""
    if isinstance(names, str):
        return re.fullmatch(name, path) is not None
    return path == name or path.endswith(f".{name}")
