"""Which samples are a process's own: its share, without what is repeated to even processes out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DistributedSampler

from filet.distributed.group import Group

__all__ = ["share"]

_END = object()


def share(
    group: Group, dataloader: Iterable[Any], samples: int | None
) -> tuple[Iterable[Any], int | None]:
    """The batches of this process, and how many samples to take of them at most, None for all.

    ``samples`` is of all processes together: each gets as many, the first ones one more where that
    does not come out even. Of a loader whose batches the first process hands out all read as many,
    so each gets that one more. What accelerate or torch repeats at the end is left out.
    """
    limits = [] if (own := _own_samples(dataloader)) is None else [own]
    in_step = isinstance(dataloader, DataLoaderDispatcher)
    if samples is not None:
        rest = samples % group.size
        limits.append(samples // group.size + (rest > 0 if in_step else group.rank < rest))
    if in_step:
        dataloader = _HandedOut(dataloader, group)
    most = min(limits, default=None)
    if most == 0:
        # Read once all the same: accelerate's loader agrees with those of the other ranks then.
        list(itertools.islice(dataloader, 1))
        return [], None
    sampler = getattr(dataloader, "batch_sampler", None)
    if getattr(sampler, "even_batches", False):
        dataloader = _Uneven(dataloader, sampler)
    return dataloader, most


def _own_samples(dataloader: Any) -> int | None:
    """How many samples of this rank's come before one that torch's DistributedSampler repeats.

    It deals all samples out and begins again at the first for whoever lacks one. None for a loader
    without one.
    """
    sampler = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    dataset: Any = sampler.dataset
    return max(0, -(-(len(dataset) - int(sampler.rank)) // int(sampler.num_replicas)))


class _HandedOut:
    """The batches of a loader that the first process reads for all, which wait for it meanwhile.

    Who failed since the last one says so before the next. Who fails as it reads, over batches of
    different lengths say, cannot (:meth:`Group.untold`).
    """

    def __init__(self, dataloader: Iterable[Any], group: Group) -> None:
        self._dataloader = dataloader
        self._group = group

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._dataloader)
        while True:
            self._group.settle()
            with self._group.untold():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch


class _Uneven:
    """The batches of a loader, none filled up with samples or repeated for another process.

    accelerate's BatchSamplerShard, of every Trainer, asks ``even_batches`` when it comes to its
    end. The loader may be the training's: it is switched off only while a batch is read. To count
    samples would not do: a batch without padding is a row of several.
    """

    def __init__(self, dataloader: Iterable[Any], sampler: Any) -> None:
        self._dataloader = dataloader
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        with self._switched_off():
            batches = iter(self._dataloader)
        while True:
            with self._switched_off():
                batch = next(batches, _END)
            if batch is _END or batch is None:  # None: older versions of accelerate, of no batch
                return
            yield batch

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        self._sampler.even_batches = False
        try:
            yield
        finally:
            self._sampler.even_batches = True
