"""Hashes of base weights, by which statistics and adapters know what they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from filet.model.targets import Target
from filet.system.transfer import values

__all__ = ["check_fingerprint", "fingerprints", "fingerprints_of"]


def fingerprints(weights: dict[str, Tensor]) -> dict[str, str]:
    """Hashes of the exact bits, shapes and dtypes of weights (m, n), the same on every machine.

    A position-weighted sum of the rows' 4-byte words (the last one filled up with zeros), modulo
    2⁶⁴: integer sums do not depend on their order, so it is computed where a weight lies, without
    copying it to the host. All of a device are waited for together.
    """
    totals = values([_hash(weight) for weight in weights.values()])
    return {
        name: f"{str(weight.dtype).removeprefix('torch.')}:{'x'.join(map(str, weight.shape))}:"
        f"{total & (2**64 - 1):016x}"
        for (name, weight), total in zip(weights.items(), totals, strict=True)
    }


def fingerprints_of(targets: Mapping[str, Target]) -> dict[str, str]:
    """Those of the base weights of these layers."""
    return fingerprints({name: target.weight for name, target in targets.items()})


def check_fingerprint(
    name: str, here: str, there: str, subject: str, model: str = "this model"
) -> None:
    """ValueError where a weight is another one ``here``, in ``model``, than the subject's.

    ``subject`` with its verb: "the statistics in FILE belong".
    """
    if here == there:
        return
    dtype, shape, _ = here.split(":")
    its_dtype, its_shape, _ = there.split(":")
    if dtype != its_dtype and shape == its_shape:
        raise ValueError(
            f"{subject} to a base model in {its_dtype}: the weight of {name} is {dtype} in "
            f"{model}; expected {its_dtype}: load the model with dtype=torch.{its_dtype} "
            f"(--dtype {its_dtype})"
        )
    raise ValueError(
        f"{subject} to another base model: the weight of {name} is {there} there and {here} in "
        f"{model} (dtype:shape:hash); expected the very same weights"
    )


def _hash(weight: Tensor) -> Tensor:
    m, n = weight.shape
    a_word = max(1, 4 // weight.element_size())
    step = max(1, 2**27 // max(1, n * weight.element_size()))  # 128 MiB at a time
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, m, step):
        rows = weight[start : start + step].contiguous()
        if n % a_word or rows.storage_offset() % a_word:
            rows = F.pad(rows, (0, -n % a_word))  # a copy
        words = rows.view(torch.int32)
        columns, index = (
            torch.arange(begin, begin + size, device=weight.device, dtype=torch.int64) * 2 + 1
            for begin, size in ((0, words.shape[1]), (start, words.shape[0]))
        )
        # Odd multipliers are invertible modulo 2⁶⁴, so no single change goes unseen.
        total += ((words * columns).sum(1) * index * -7046029254386353131).sum()
    return total
