"""What processes tell each other comes as it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from filet.distributed.group import current
from ranks import run, values


def said(rank: int, folder: Path) -> list[Any]:
    group = current()
    assert group is not None
    tensors = {
        "float64": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "bfloat16": torch.full((2,), rank + 0.5, dtype=torch.bfloat16),
        "number": torch.tensor(rank),
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    told = group.exchanged(tensors if rank else None)  # of one alone, and the lengths differ
    told[1]["number"].add_(1)  # a copy of one's own, which may be changed
    nothing = group.exchanged(None)
    group.settle()
    again = group.exchanged([rank] * (1 + 1000 * rank))
    same = group.from_first(tensors["float64"] + rank)
    return [told, tensors["number"].item(), nothing, again, same]


def test_values_come_as_they_were_given(tmp_path: Path) -> None:
    for rank, (told, own, nothing, again, same) in enumerate(values(run(3, said, tmp_path))):
        assert told[0] is None and own == rank
        for other in (1, 2):
            assert list(told[other]) == ["float64", "bfloat16", "number", "empty", "parameter"]
            assert torch.equal(told[other]["float64"], torch.arange(6.0).double().view(2, 3).T)
            assert told[other]["bfloat16"].tolist() == [other + 0.5] * 2
            assert told[other]["bfloat16"].dtype == torch.bfloat16
            assert told[other]["number"] == other + (other == 1)
            assert told[other]["empty"].shape == (0, 3)
            assert type(told[other]["parameter"]) is nn.Parameter
        assert nothing == [None] * 3
        assert again == [[0], [1] * 1001, [2] * 2001]
        assert torch.equal(same, torch.arange(6.0).double().view(2, 3).T)
