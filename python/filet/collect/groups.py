"""Moments that do not fit on their device: several passes, each over a group of the blocks.

A moment is a sum that every batch adds to, so moving moments out and in again would cost their size
twice a batch: 40 GB for a model of 8B. Instead the batches are run again for each group, and only
what is finished goes to host memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from filet.collect.run import ForwardFn, collect_moments
from filet.config import FiletConfig
from filet.model.batch import on_host, samples_in
from filet.model.blocks import blocks
from filet.model.inputs import check_dataloader
from filet.model.targets import Target
from filet.system.transfer import background_copies
from filet_kernels import Moments

__all__ = ["Batches", "collect_in_passes", "groups", "moment_bytes"]


class Batches:
    """The batches of a dataloader, which is read once. With ``keep`` they can be read again.

    Kept are copies in host memory of the batches that were read.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        check_dataloader(dataloader)
        self.dataset = getattr(dataloader, "dataset", None)
        self.keep = False
        self._source = iter(dataloader)
        self._kept: list[Any] = []

    def first(self) -> Any:
        """The first batch with a sample in it, None without any; iterating starts over with it."""
        while not any(map(samples_in, self._kept)):
            read = [on_host(batch) for batch in itertools.islice(self._source, 1)]
            if not read:
                return None
            self._kept += read
        return next(batch for batch in self._kept if samples_in(batch))

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for batch in self._source:
            if self.keep:
                self._kept.append(on_host(batch))
            yield batch


def moment_bytes(
    targets: dict[str, Target], shared_input: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Bytes of each module's moments: input, output. A shared input moment counts once."""
    sizes = {}
    for name, target in targets.items():
        side = min(target.weight.shape) ** 2 * (8 if target.weight.dtype == torch.float64 else 4)
        sizes[name] = (0 if name in shared_input else side, side)
    return sizes


def groups(targets: dict[str, Target], passes: int) -> list[list[str]]:
    """At most ``passes`` groups of whole blocks, each with about its share of every device's bytes.

    A block is on the device of its first target; the modules that share an input are in one block.
    """
    sizes = moment_bytes(targets, {})
    by_device: dict[torch.device, list[list[str]]] = {}
    for names in blocks(targets).values():
        by_device.setdefault(targets[names[0]].weight.device, []).append(names)
    found: list[list[str]] = [[] for _ in range(passes)]
    for its_blocks in by_device.values():
        weights = [sum(sum(sizes[name]) for name in names) for names in its_blocks]
        before = 0.0
        for names, weight in zip(its_blocks, weights, strict=True):
            middle = (before + weight / 2) / sum(weights)
            found[int(middle * passes)] += names
            before += weight
    return [group for group in found if group]


def collect_in_passes(
    peft_model: Any,
    targets: dict[str, Target],
    batches: Batches,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    passes: int,
) -> tuple[dict[str, Moments], dict[str, str], dict[str, int]]:
    """The moments, whose input each module shares, and the counts of :func:`collect_moments`.

    With more than one pass the moments are in host memory. On a CPU they are bitwise those of one
    pass; on a GPU the forward of a layer whose moments are taken rounds in another place.
    """
    parts = groups(targets, passes)
    if len(parts) == 1:
        hooks, counts = collect_moments(
            peft_model, targets, batches, config, forward_fn, show_progress_bar
        )
        return hooks.moments, hooks.shared_input, counts
    batches.keep = True
    moments: dict[str, Moments] = {}
    shared_input: dict[str, str] = {}
    scale = None
    for number, part in enumerate(parts, start=1):
        hooks, counts = collect_moments(
            peft_model,
            targets,
            batches,
            config,
            forward_fn,
            show_progress_bar,
            frozenset(part),
            scale,
            f"FILet statistics, pass {number} of {len(parts)}",
        )
        scale = hooks.gradient_scale
        moments |= _moved_to_host(hooks.moments)
        shared_input |= hooks.shared_input
        del hooks  # with its moments: the next pass needs their memory
    return moments, shared_input, counts


def _moved_to_host(moments: dict[str, Moments]) -> dict[str, Moments]:
    """The same moments on the CPU, those of shared inputs still shared."""
    sides = {id(side): side for m in moments.values() for side in (m.input, m.output)}
    sums = {str(key): side.sum for key, side in sides.items() if side.sum.is_cuda}
    with background_copies(sums) as copied:
        moved = {
            key: dataclasses.replace(side, sum=copied(str(key)), count=side.count.cpu())
            if side.sum.is_cuda
            else side
            for key, side in sides.items()
        }
    return {
        name: Moments(moved[id(m.input)], moved[id(m.output)], m.shape, m.loss_terms.cpu())
        for name, m in moments.items()
    }
