"""Which samples are a process's own: its share, without what a sampler repeats to even them out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DistributedSampler

from filet.distributed.group import Group

__all__ = ["own_samples", "share"]


def share(
    group: Group, dataloader: Iterable[Any], samples: int | None
) -> tuple[Iterable[Any], int | None]:
    """The batches of this process, and how many samples to take of them at most, None for all.

    ``samples`` is of all processes together: each gets as many, the first ones one more where that
    does not come out even. What a known sampler repeats at the end (:func:`own_samples`) is left
    out.
    """
    limits = [] if (own := own_samples(dataloader)) is None else [own]
    if samples is not None:
        limits.append(samples // group.size + (group.rank < samples % group.size))
    most = min(limits, default=None)
    if most == 0:
        # Read once all the same: accelerate's loader agrees with those of the other ranks then.
        list(itertools.islice(dataloader, 1))
        return [], None
    return dataloader, most


def own_samples(dataloader: Any) -> int | None:
    """How many samples of this rank's come before those that its sampler repeats; None: unknown.

    Known are torch's DistributedSampler, and accelerate's BatchSamplerShard with ``even_batches``,
    which a Trainer has. Both count all samples through, deal them out and begin again at the first
    for whoever lacks some. The repeated ones are the last of a rank.
    """
    batches: Any = getattr(dataloader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        dataset: Any = sampler.dataset
        return max(0, -(-(len(dataset) - int(sampler.rank)) // int(sampler.num_replicas)))
    inner: Any = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    if not getattr(batches, "even_batches", False) or not hasattr(inner, "__len__"):
        return None
    if batches.batch_size is None:
        return None
    size = batches.batch_size // (batches.num_processes if batches.split_batches else 1)
    rounds, rest = divmod(len(inner), size * batches.num_processes)
    return int(rounds * size + min(max(rest - batches.process_index * size, 0), size))
