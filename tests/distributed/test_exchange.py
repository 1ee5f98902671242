"""What processes tell each other comes as it was given, and nothing of it stays."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from filet.distributed.group import current
from ranks import run, values

KINDS = (
    "float64", "bfloat16", "number", "empty", "parameter", "learned", "negative", "sparse",
)  # fmt: skip


def said(rank: int, folder: Path) -> list[Any]:
    group = current()
    assert group is not None
    tensors = {
        "float64": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "bfloat16": torch.full((2,), rank + 0.5, dtype=torch.bfloat16),
        "number": torch.tensor(rank),
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "parameter": nn.Parameter(torch.ones(2)),
        "learned": torch.ones(2, requires_grad=True),
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
    }
    told = group.exchanged(tensors if rank else None)  # of one alone, and the lengths differ
    told[1]["number"].add_(1)  # a copy of one's own, which may be changed
    nothing = group.exchanged(None)
    group.settle()
    again = group.exchanged([rank] * (1 + 1000 * rank))
    same = group.from_first(tensors["float64"] + rank)
    with torch.device("meta"):  # whatever the program's default device is
        assert group.exchanged(rank) == [0, 1, 2] and group.from_first(rank) == 0
        group.gathered(b"" if rank == 0 else b"some")
    return [told, tensors["number"].item(), nothing, again, same]


def test_values_come_as_they_were_given(tmp_path: Path) -> None:
    for rank, (told, own, nothing, again, same) in enumerate(values(run(3, said, tmp_path))):
        assert told[0] is None and own == rank
        for other in (1, 2):
            assert told[other].keys() == {*KINDS}
            assert torch.equal(told[other]["float64"], torch.arange(6.0).double().view(2, 3).T)
            assert told[other]["bfloat16"].tolist() == [other + 0.5] * 2
            assert told[other]["bfloat16"].dtype == torch.bfloat16
            assert told[other]["number"] == other + (other == 1)
            assert told[other]["empty"].shape == (0, 3)
            assert type(told[other]["parameter"]) is nn.Parameter
            assert told[other]["learned"].requires_grad
            assert told[other]["negative"].tolist() == [0, 0]
            assert torch.equal(told[other]["sparse"].to_dense(), torch.eye(3))
        assert nothing == [None] * 3
        assert again == [[0], [1] * 1001, [2] * 2001]
        assert torch.equal(same, torch.arange(6.0).double().view(2, 3).T)


class Own(UserWarning):
    """What other processes may not know."""


def failing(rank: int, folder: Path) -> list[Any]:
    group = current()
    assert group is not None
    alive: list[weakref.ref[Tensor]] = []

    def call() -> None:
        large = torch.ones(3)
        alive.append(weakref.ref(large))
        with group:
            if rank == 1:
                raise MemoryError("no room")
            group.exchanged(large)

    try:
        call()
    except MemoryError as error:
        message = str(error)
    gc.collect()
    left = alive[0]() is not None
    said = group.accounts(message)

    class Unknown(Own):
        """Nobody can pickle this one."""

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with group:
            if rank:
                warnings.warn(f"of {rank}", Unknown, stacklevel=1)
    shown = sorted((str(each.message), each.category.__name__) for each in caught)
    return [message, left, said, shown]


def test_nothing_of_a_failed_call_stays(tmp_path: Path) -> None:
    """Its frames would hold what they had: a GPU's memory, that a retry needs."""
    found = values(run(3, failing, tmp_path))
    for rank, (message, left, said, shown) in enumerate(found):
        assert message == ("no room" if rank == 1 else "rank 1: no room")
        assert not left
        assert said == [None, "no room", None]
        if rank == 0:
            assert shown == [(f"rank {r}: of {r}", "UserWarning") for r in (1, 2)]
