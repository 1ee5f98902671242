"""Moments that do not fit on their device: several passes, each over a group of the blocks.

A moment is a sum that every batch adds to, so moving moments out and in again would cost their size
twice a batch: 40 GB for a model of 8B. Instead the batches are run again for each group, and only
what is finished goes to host memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from filet.collect.batches import Batches
from filet.collect.hooks import MomentHooks
from filet.collect.run import collect_moments
from filet.collect.sizes import moment_bytes
from filet.collect.together import Together
from filet.config import FiletConfig
from filet.loss.batch import ForwardFn
from filet.model.blocks import blocks
from filet.model.targets import Target
from filet.system.transfer import background_copies
from filet_kernels import Moments, SecondMoment

__all__ = ["collect_in_passes", "groups", "moved_to_host"]


def groups(targets: dict[str, Target], passes: int) -> list[list[str]]:
    """At most ``passes`` groups of whole blocks, each with about its share of every device's bytes.

    A block is on the device of its first target; the modules that share an input are in one block.
    """
    sizes = moment_bytes(targets, {})
    by_device: dict[torch.device, list[list[str]]] = {}
    for names in blocks(targets).values():
        by_device.setdefault(targets[names[0]].device, []).append(names)
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
    together: Together | None = None,
) -> tuple[dict[str, Moments], dict[str, str], dict[str, int]]:
    """The moments, whose input each module shares, and the counts of :func:`collect_moments`.

    With ``together`` they are of all processes, and each moment is on the one that owns it.
    With more than one pass the moments are in host memory. On a CPU they are bitwise those of one
    pass; on a GPU the forward of a layer whose moments are taken rounds in another place.
    """
    parts = groups(targets, passes) if passes > 1 else [list(targets)]
    if len(parts) == 1:
        hooks, counts = collect_moments(
            peft_model, targets, batches, config, forward_fn, show_progress_bar, together=together
        )
        return *_of_all(hooks, parts[0], counts, together), counts
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
            together,
        )
        scale = hooks.gradient_scale
        found, shared = _of_all(hooks, part, counts, together)
        moments |= _moved_to_host(found)
        shared_input |= shared
        del hooks, found  # with the moments: the next pass needs their memory
    return moments, shared_input, counts


def _of_all(
    hooks: MomentHooks, names: list[str], counts: dict[str, int], together: Together | None
) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments of a pass, of all processes, and whose input each module shares."""
    if together is None:
        return hooks.moments, hooks.shared_input
    return together.moments(names, hooks.moments, hooks.shared_input, counts["loss_terms"])


def moved_to_host(moments: Iterable[SecondMoment]) -> dict[int, SecondMoment]:
    """By the ``id`` of each of these moments the same one on the CPU."""
    sides = {id(side): side for side in moments}
    sums = {str(key): side.sum for key, side in sides.items() if side.sum.is_cuda}
    with background_copies(sums) as copied:
        return {
            key: dataclasses.replace(side, sum=copied(str(key)), count=side.count.cpu())
            if side.sum.is_cuda
            else side
            for key, side in sides.items()
        }


def _moved_to_host(moments: dict[str, Moments]) -> dict[str, Moments]:
    """The same moments on the CPU, those of shared inputs still shared."""
    moved = moved_to_host(side for m in moments.values() for side in (m.input, m.output))
    return {
        name: Moments(moved[id(m.input)], moved[id(m.output)], m.shape, m.loss_terms.cpu())
        for name, m in moments.items()
    }
