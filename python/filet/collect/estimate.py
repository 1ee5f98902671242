"""What a pass will need, before it runs: memory on each device, batch size, passes, time.

Sizes of moments follow from the weights' shapes. What a batch needs is measured
(:mod:`filet.collect.probe`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from filet.collect.groups import groups
from filet.collect.plan import MOST_TOKENS, DevicePlan, Plan
from filet.collect.probe import Probe, gpus_of, probed
from filet.collect.sizes import moment_bytes, relative_cost, selection_bytes, weight_bytes
from filet.collect.unrounded import bytes_a_row
from filet.config import FiletConfig, checked_config
from filet.loss.batch import ForwardFn
from filet.model.batch import samples_in, tensors_in
from filet.model.blocks import blocks
from filet.model.inputs import Inputs, check_batch
from filet.model.isolation import preserved
from filet.model.sharded import units
from filet.model.targets import Target, check_peft_model, checked_targets
from filet.system.memory import ADVICE, OutOfMemoryError, available, capacity
from filet.system.text import readable

__all__ = ["CPU_TOKENS", "FEW_TOKENS", "estimate", "passes_by_size", "passes_that_fit"]

# With fewer, another pass is preferred: moments are read and written once a batch. Those of an 8B
# model, 19.6 GB, take 13 ms at 3 TB/s, and 512 tokens forward and backward about 33 (an H100 at its
# rate for 4096 tokens).
FEW_TOKENS = 512
CPU_TOKENS = 4096
"""Tokens of a batch on a CPU, whose memory is not measured: 8 samples of 512."""

# Of a GPU's memory, left alone: fragments, and what CUDA loads when a kernel first runs.
_RESERVE = 0.04

# Share of the free memory below which moments are taken in one pass without a measurement.
_SMALL = 0.4


def estimate(
    peft_model: PeftModel,
    batch: Any,
    config: FiletConfig | None = None,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    *,
    batch_size: int | Literal["auto"] = "auto",
    tokens: int | None = None,
    keep: bool = False,
) -> Plan:
    """What :func:`filet.collect_statistics` will need on data like this batch, and how it would go.

    Runs one and two samples of the batch forward and backward (the whole batch, twice, where it
    cannot be divided, and where the model is compiled: another shape would compile it anew). The
    model comes back as it was.

    Args:
        peft_model, config, adapter_name, forward_fn: as in :func:`filet.collect_statistics`;
            ``config.samples`` is the number of samples, ``config.passes`` a number to keep to.
        batch: one batch; memory is estimated for samples as long as these.
        batch_size: samples in a batch; "auto" finds the largest that fits.
        tokens: of the whole run; ``config.samples`` as long as these by default.
        keep: whether moments of data to keep are taken too (their pass is not in the time).

    Returns:
        :class:`Plan`. Sizes of moments are exact (an expert that no token reaches takes less); the
        rest is measured, and assumes that memory grows with the number of samples.

    Raises:
        OutOfMemoryError: already one or two samples need more than there is.
        TypeError, ValueError: an argument that does not fit.
    """
    config = checked_config(config)
    if batch_size != "auto" and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}; expected an integer ≥ 1, or 'auto'")
    peft_model = check_peft_model(peft_model, adapter_name)
    check_batch(batch, forward_fn)
    batch = Inputs(peft_model.base_model.model, forward_fn).checked(batch, 0)
    targets, _ = checked_targets(peft_model, adapter_name)
    if units(peft_model):
        raise ValueError(
            "FSDP has sharded the model, and a batch that is too large for one process would leave "
            "the others waiting; expected an estimate of the model before it is sharded"
        )
    with preserved(peft_model, adapter_name, targets):
        return _plan(peft_model, targets, batch, config, forward_fn, batch_size, tokens, keep)


def passes_that_fit(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    keep: bool,
) -> int:
    """The smallest number of passes over batches like this one that fits.

    A warning if none does, or where smaller batches would take half as many or fewer.

    The model must be inside :func:`preserved`. Nothing is measured where the moments are small
    beside the free memory: then more passes would hardly make room for anything.
    """
    moments = moment_bytes(targets, {}, keep)
    small = [
        sum(sum(moments[name]) for name, t in targets.items() if t.device == device)
        <= _SMALL * available(device)
        for device in gpus_of(peft_model)
    ]
    if all(small):
        return 1
    size = samples_in(batch)
    plan = _plan(peft_model, targets, batch, config, forward_fn, size, None, keep)
    for d in plan.devices:
        least = min(d.moments_at_a_time.values()) + (d.fixed or 0) + (d.per_sample or 0)
        if d.free is not None and d.total is not None and least > d.free + _RESERVE * d.total:
            raise OutOfMemoryError(
                f"out of memory before the pass: {readable(least)} needed on {d.device} for the "
                f"moments of one group of modules and one sample of {plan.length} tokens, where "
                f"{readable(d.free)} of {readable(d.total)} are free; expected one or more of: "
                f"{', '.join(ADVICE)}",
                "pass",
                readable(least),
            )
    if not plan.fits:
        warnings.warn(plan.advice, stacklevel=5)
    elif plan.sooner:
        warnings.warn(
            f"the pass goes {plan.passes} times over the data, so large is a batch of {size} "
            f"samples × {plan.length} tokens: {plan.sooner}",
            stacklevel=5,
        )
    return plan.passes


def passes_by_size(
    peft_model: PeftModel, targets: dict[str, Target], config: FiletConfig, keep: bool
) -> int:
    """The smallest number of passes whose moments are small beside the free memory, or the most.

    For a sharded model: of a batch that is too large for one process, the others would not hear.
    """
    gpus = gpus_of(peft_model)
    if not gpus:
        return 1
    moments = moment_bytes(targets, {}, keep)
    free = sum(available(device) for device in gpus)
    choices = _choices(targets, config)
    for passes in choices:
        parts = groups(targets, passes)
        if max(sum(sum(moments[name]) for name in part) for part in parts) <= _SMALL * free:
            return passes
    return choices[-1]


def _plan(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    batch_size: int | Literal["auto"],
    tokens: int | None,
    keep: bool,
) -> Plan:
    gpus = gpus_of(peft_model)
    free = {device: available(device) for device in gpus}
    probe = probed(peft_model, targets, batch, config, forward_fn, gpus)
    moments = moment_bytes(targets, probe.shared_input, keep)
    length = _length(batch)
    choices = _choices(targets, config)
    parts = {passes: groups(targets, passes) for passes in choices}
    devices = [
        _device_plan(peft_model, targets, device, free.get(device), moments, parts, probe, keep)
        for device in gpus or [torch.device("cpu")]
    ]
    cap = max(1, (MOST_TOKENS if gpus else CPU_TOKENS) // length)
    if config.samples is not None:
        cap = min(cap, config.samples)
    passes, chosen = _choose(devices, choices, batch_size, cap, length, bool(gpus))
    if tokens is None and config.samples is not None:
        tokens = config.samples * length
    seconds = None
    if tokens is not None:
        samples = tokens / length
        seconds = samples * probe.seconds * (passes + relative_cost(targets, moments, bool(gpus)))
    return Plan(
        devices=tuple(devices),
        moments=moments,
        shared_input=probe.shared_input,
        length=length,
        batch_size=chosen,
        passes=passes,
        samples=config.samples,
        tokens=tokens,
        seconds=seconds,
    )


def _choices(targets: dict[str, Target], config: FiletConfig) -> Sequence[int]:
    """Numbers of passes that there can be: at most one a block of the device with the most."""
    if config.passes != "auto":
        return [config.passes]
    on: dict[torch.device, int] = {}
    for names in blocks(targets).values():
        device = targets[names[0]].device
        on[device] = on.get(device, 0) + 1
    return range(1, max(on.values()) + 1)


def _device_plan(
    peft_model: PeftModel,
    targets: dict[str, Target],
    device: torch.device,
    free: int | None,
    moments: Mapping[str, tuple[int, int]],
    parts: Mapping[int, list[list[str]]],
    probe: Probe,
    keep: bool,
) -> DevicePlan:
    """``free``: of a GPU, before anything was measured. ``parts``: groups by number of passes."""
    mine = [target for target in targets.values() if target.device == device]
    here = {target.name: sum(moments[target.name]) for target in mine}
    fixed = per_sample = total = None
    if free is not None:
        total = capacity(device)
        free -= int(_RESERVE * total)
        fixed, per_sample = probe.memory(device)
        # y and h of one module at a time, which the probe has not formed.
        per_sample += probe.rows * max((bytes_a_row(target.shape) for target in mine), default=0)
    return DevicePlan(
        device=str(device),
        total=total,
        free=free,
        weights=weight_bytes(peft_model, device),
        moments=sum(here.values()),
        moments_at_a_time={
            passes: max(sum(here.get(name, 0) for name in part) for part in found)
            for passes, found in parts.items()
        },
        fixed=fixed,
        per_sample=per_sample,
        selection=selection_bytes(mine, probe.shared_input, keep),
    )


def _choose(
    devices: Sequence[DevicePlan],
    choices: Sequence[int],
    batch_size: int | Literal["auto"],
    cap: int,
    length: int,
    gpus: bool,
) -> tuple[int, int]:
    """Passes and batch size: as few passes as leave room for a batch that is worth it."""
    worth = cap if cap * length < FEW_TOKENS else -(-FEW_TOKENS // length)
    for least in (worth, 1) if batch_size == "auto" else (batch_size,):
        for passes in choices if gpus else choices[:1]:
            room = min(device.largest_batch(passes) for device in devices)
            if room >= least:
                return passes, min(room, cap) if batch_size == "auto" else batch_size
    return choices[-1], 1 if batch_size == "auto" else batch_size


def _length(batch: Any) -> int:
    """Tokens of a sample; 1 where the batch has no sequence (images, say)."""
    entry = batch.get("input_ids") if isinstance(batch, Mapping) else None
    candidates = [entry] if isinstance(entry, Tensor) else list(tensors_in(batch))
    ids = next((t for t in candidates if t.dim() > 1 and not t.is_floating_point()), None)
    return 1 if ids is None else ids.shape[1]
