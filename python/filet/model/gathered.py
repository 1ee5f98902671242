"""The weights of a sharded model, a block at a time whole on the process that owns it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from filet.model.blocks import blocks
from filet.model.sharded import gathering, is_sharded, whole
from filet.model.targets import Target
from filet.model.values import Values

__all__ = ["with_weights"]


class _Gathered(Values):
    """Those of a plain module whose weight was gathered from the processes that have its rows."""

    def __init__(self, values: Values, weight: Tensor) -> None:
        super().__init__(values.module, values.dtype)
        self.multiplies = False  # its forward is with what FSDP gathers
        self._weight = weight

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._weight


def with_weights(
    targets: Mapping[str, Target], owners: Mapping[str, int], rank: int
) -> Iterator[dict[str, Target]]:
    """The targets that ``rank`` owns, in parts, each with its weights whole.

    Of a model that is not sharded that is one part, and nothing is gathered. Else a part has a
    block of every rank's, and all of them take it at the same time: collective. A weight is whole
    on its owner until the next part, on the others while it is gathered.
    """
    if any(is_sharded(target.weight) for target in targets.values()):
        return _gathered(targets, owners, rank)
    return iter([{name: target for name, target in targets.items() if owners[name] == rank}])


def _gathered(
    targets: Mapping[str, Target], owners: Mapping[str, int], rank: int
) -> Iterator[dict[str, Target]]:
    of_rank: dict[int, list[list[str]]] = {}
    for names in blocks(dict(targets)).values():
        for owner in sorted({owners[name] for name in names}):
            its = [name for name in names if owners[name] == owner]
            of_rank.setdefault(owner, []).append(its)
    for part in itertools.zip_longest(*(of_rank[owner] for owner in sorted(of_rank)), fillvalue=()):
        mine: dict[str, Target] = {}
        with gathering():
            for name in itertools.chain(*part):
                weight = whole(targets[name].weight)
                if owners[name] == rank:
                    values = _Gathered(targets[name].values, weight)
                    mine[name] = dataclasses.replace(targets[name], values=values)
                del weight
        yield mine
        mine.clear()  # whoever took the part still has the dict
