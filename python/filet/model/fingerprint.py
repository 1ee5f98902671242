"""Hashes of base weights, by which statistics and adapters know what they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from filet.model.values import Values
from filet.system.transfer import values

__all__ = ["check_fingerprint", "fingerprints", "fingerprints_of"]

_FACTOR = -7046029254386353131  # odd: invertible modulo 2⁶⁴


def fingerprints(weights: dict[str, Tensor]) -> dict[str, str]:
    """Hashes of the exact bits, shapes and dtypes of weights (m, n), the same on every machine.

    A position-weighted sum of the rows' 4-byte words (the last one filled up with zeros), modulo
    2⁶⁴: integer sums do not depend on their order, so it is computed where a weight lies, without
    copying it to the host. All of a device are waited for together.
    """
    totals = values([_hash(weight) for weight in weights.values()])
    return {
        name: _written(str(weight.dtype).removeprefix("torch."), weight.shape, total)
        for (name, weight), total in zip(weights.items(), totals, strict=True)
    }


def fingerprints_of(of: Mapping[str, Values]) -> dict[str, str]:
    """Those of base weights. Of quantised ones: of what they are stored as, to the bit."""
    hashes = {name: [_hash(rows) for rows in _rows(each)] for name, each in of.items()}
    numbers = iter(values([each for its in hashes.values() for each in its]))
    found = {}
    for name, its in hashes.items():
        total = 0
        for _ in its:  # in their order
            total = total * _FACTOR + next(numbers)
        found[name] = _written(of[name].kind, of[name].shape, total)
    return found


def _written(kind: str, shape: Sequence[int], total: int) -> str:
    return f"{kind}:{'x'.join(map(str, shape))}:{total & (2**64 - 1):016x}"


def _rows(its: Values) -> list[Tensor]:
    """What is hashed of a weight: itself, or the bytes of its parts in rows of 4096 and a rest."""
    if not its.quantised:
        return [its.weight()]
    found = []
    for part in its.stored():
        flat = part.contiguous().view(-1).view(torch.uint8)
        whole = flat.numel() // 4096 * 4096
        rows = flat[:whole].view(-1, 4096), flat[whole:].view(1, -1)
        found += [each for each in rows if each.numel()]
    return found


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
    quantised = not (hasattr(torch, dtype) and hasattr(torch, its_dtype))
    if dtype != its_dtype and shape == its_shape and quantised:
        raise ValueError(
            f"{subject} to a base in {its_dtype}: the weight of {name} is {dtype} in {model}; "
            "expected the base quantised as it was there, for the two are other models"
        )
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
        # Odd multipliers are invertible, so no single change goes unseen.
        total += ((words * columns).sum(1) * index * _FACTOR).sum()
    return total
