"""Hashes of base weights, by which statistics and adapters know what they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from filet.model.parts import DOUBLE
from filet.model.sharded import over_shards
from filet.model.values import Values
from filet.system.transfer import values

__all__ = ["check_fingerprint", "check_weights", "fingerprints", "fingerprints_of"]

_FACTOR = -7046029254386353131  # odd: invertible modulo 2⁶⁴


def fingerprints(weights: dict[str, Tensor]) -> dict[str, str]:
    """Hashes of the exact bits, shapes and dtypes of weights (m, n), the same on every machine.

    A position-weighted sum of the rows' 4-byte words (the last one filled up with zeros), modulo
    2⁶⁴: integer sums do not depend on their order, so it is computed where a weight lies, or its
    rows do, without copying or gathering it. All of a device are waited for together.
    """
    totals = values(over_shards(weights.values(), _hash))
    return {
        name: _written(_name(weight.dtype), weight.shape, total)
        for (name, weight), total in zip(weights.items(), totals, strict=True)
    }


def fingerprints_of(of: Mapping[str, Values]) -> dict[str, str]:
    """Those of base weights. Of quantised ones: of what they are stored as (``stored``)."""
    lengths: dict[str, int] = {}

    def parts() -> Iterator[Tensor]:
        for name, its in of.items():
            rows = _rows(its)
            lengths[name] = len(rows)
            yield from rows

    numbers = iter(values(over_shards(parts(), _hash)))
    found = {}
    for name, length in lengths.items():
        total = 0
        for _ in range(length):  # in their order
            total = total * _FACTOR + next(numbers)
        found[name] = _written(of[name].kind, of[name].shape, total)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def check_weights(
    of: Mapping[str, Values], recorded: Mapping[str, str], subject: str, model: str = "this model"
) -> None:
    """ValueError for the first weight of ``model`` that is another one than the subject's.

    A plain weight in another dtype is the same if its values are: a base in bfloat16 may be loaded
    in float32, and prepare_model_for_kbit_training casts what a quantised base has unquantised.

    Args:
        of, recorded: the weights, and the fingerprint that each should have.
        subject: whose those are, as in :func:`check_fingerprint`.
    """
    here = fingerprints_of(of)
    cast = {}
    for name, its in of.items():
        kind = recorded[name].partition(":")[0]
        dtype = getattr(torch, kind, None)
        if isinstance(dtype, torch.dtype) and not its.quantised and kind != its.kind:
            cast[name] = its.weight(), dtype
    for name, (weight, dtype) in cast.items():
        hashed = over_shards([weight], partial(_hash, dtype=dtype))
        lost = over_shards([weight], partial(_lost, dtype=dtype))
        total, number = values([*hashed, *lost])
        if not number and _written(_name(dtype), weight.shape, total) == recorded[name]:
            here[name] = recorded[name]
    for name, found in here.items():
        check_fingerprint(name, found, recorded[name], subject, model)


def check_fingerprint(
    name: str, here: str, there: str, subject: str, model: str = "this model"
) -> None:
    """ValueError where a weight is another one ``here``, in ``model``, than the subject's.

    ``subject`` with its verb: "the statistics in FILE belong".
    """
    # bitsandbytes saves a base that it repacked for a CPU with plain scales, which are the same.
    if here.replace(DOUBLE, "") == there.replace(DOUBLE, ""):
        return
    kind, shape, _ = here.split(":")
    its_kind, its_shape, _ = there.split(":")
    plain = hasattr(torch, kind) and hasattr(torch, its_kind)
    if kind != its_kind and shape == its_shape and not plain:
        raise ValueError(
            f"{subject} to a base in {its_kind}: the weight of {name} is {kind} in {model}; "
            "expected the base quantised as it was there, for the two are other models"
        )
    if kind != its_kind and shape == its_shape:
        raise ValueError(
            f"{subject} to a base model in {its_kind}: the weight of {name} is {kind} in "
            f"{model}; expected {its_kind}: load the model with dtype=torch.{its_kind} "
            f"(--dtype {its_kind})"
        )
    weights = f"the weight of {name} is {there} there and {here} in {model}"
    if kind == its_kind and shape == its_shape and not plain:
        raise ValueError(
            f"{subject} to another base: {weights} (kind:shape:hash); expected the very same "
            "codes: the weights quantised from the same dtype (dtype= of from_pretrained), with "
            "no adapter merged into them and unmerged, by which PEFT quantises them anew"
        )
    raise ValueError(
        f"{subject} to another base model: {weights} ({'dtype' if plain else 'kind'}:shape:hash); "
        "expected the very same weights"
    )


def _lost(weight: Tensor, _: int, dtype: torch.dtype) -> Tensor:
    """How many numbers of a weight a cast to ``dtype`` changes."""
    lost = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in _pieces(weight):
        rows = weight[start:stop]
        lost += (rows.to(dtype).to(rows.dtype) != rows).sum()
    return lost


def _pieces(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Its rows, 128 MiB at a time."""
    m, n = weight.shape
    step = max(1, 2**27 // max(1, n * weight.element_size()))
    for start in range(0, m, step):
        yield start, min(start + step, m)


def _hash(weight: Tensor, first: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of rows from the ``first`` of a weight on; ``dtype``: in which, its own by default."""
    dtype = dtype or weight.dtype
    n = weight.shape[1]
    a_word = max(1, 4 // dtype.itemsize)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in _pieces(weight):
        rows = weight[start:stop].to(dtype).contiguous()
        if n % a_word or rows.storage_offset() % a_word:
            rows = F.pad(rows, (0, -n % a_word))  # a copy
        words = rows.view(torch.int32)
        columns, index = (
            torch.arange(begin, begin + size, device=weight.device, dtype=torch.int64) * 2 + 1
            for begin, size in ((0, words.shape[1]), (first + start, words.shape[0]))
        )
        # Odd multipliers are invertible, so no single change goes unseen.
        total += ((words * columns).sum(1) * index * _FACTOR).sum()
    return total
