"""What all processes have, which has to be the same, beside what one process has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(one: Any, two: Any, where: str) -> None:
    """To the bit."""
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], f"{where}: {key}")
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two, where


def assert_as_one(many: list[Any], one: Any, rtol: float = 1e-5) -> None:
    """Ranks alike to the bit; of one process, energies to ``rtol`` and the same choices."""
    for rank, each in enumerate(many[1:], start=1):
        assert_same(each, many[0], f"rank {rank}")
    got = many[0]
    for key in ("left", "counts", "tokens", "shared"):
        assert got[key] == one[key], key
    assert_same(got["indices"], one["indices"], "indices")
    for name, energies in one["energies"].items():
        torch.testing.assert_close(got["energies"][name], energies, rtol=rtol, atol=0)
    for name, factor in one["factors"].items():
        torch.testing.assert_close(got["factors"][name], factor, rtol=10 * rtol, atol=rtol)
