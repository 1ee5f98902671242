"""What a pass will need, before it runs: memory on each device, batch size, passes, time.

Sizes of moments follow from the weights' shapes. What the forward keeps for the backward, and what
the loss and the attention need besides, depends on the model's code: it is measured, on one and on
two samples that go forward and backward. Which modules share an input shows on the way.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from filet.collect.groups import groups, moment_bytes
from filet.collect.hooks import bound
from filet.collect.plan import MOST_TOKENS, DevicePlan, Plan
from filet.collect.run import ForwardFn, collect_moments
from filet.config import FiletConfig, checked_config
from filet.model.batch import first_samples, is_divisible, samples_in, tensors_in
from filet.model.blocks import blocks
from filet.model.inputs import Inputs, check_batch
from filet.model.isolation import preserved
from filet.model.targets import Target, check_peft_model, check_targets, find_targets
from filet.system.memory import ADVICE, OutOfMemoryError, available
from filet.system.text import readable

__all__ = ["CPU_TOKENS", "estimate", "passes_that_fit"]

# With fewer, another pass is preferred: moments are read and written once a batch. Those of an 8B
# model, 19.6 GB, take 13 ms at 3 TB/s, and 512 tokens forward and backward about 33 (an H100 at its
# rate for 4096 tokens).
_FEW_TOKENS = 512


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
    targets, unsupported = find_targets(peft_model, adapter_name)
    check_targets(peft_model, targets, unsupported, adapter_name)
    with preserved(peft_model, adapter_name, targets):
        return _plan(peft_model, targets, batch, config, forward_fn, batch_size, tokens)


def passes_that_fit(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
) -> int:
    """The smallest number of passes over batches like this one that fits; a warning if none does.

    The model must be inside :func:`preserved`. Nothing is measured where the moments are small
    beside the free memory: then more passes would hardly make room for anything.
    """
    moments = moment_bytes(targets, {})
    small = [
        sum(sum(moments[name]) for name, t in targets.items() if t.weight.device == device)
        <= _SMALL * available(device)
        for device in _gpus(peft_model)
    ]
    if all(small):
        return 1
    size = samples_in(batch)
    plan = _plan(peft_model, targets, batch, config, forward_fn, size, None)
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
        warnings.warn(plan.advice, stacklevel=3)
    return plan.passes


def _plan(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    batch_size: int | Literal["auto"],
    tokens: int | None,
) -> Plan:
    given = samples_in(batch)
    divisible = given > 1 and is_divisible(batch) and not _is_compiled(peft_model)
    sizes = (1, 2) if divisible else (given, given)
    gpus = _gpus(peft_model)
    free = {device: available(device) for device in gpus}
    probe = _probe(peft_model, targets, batch, config, forward_fn, sizes, gpus)
    moments = moment_bytes(targets, probe.shared_input)
    length = _length(batch)
    most = max(len(names) for names in _by_device(targets, blocks(targets)).values())
    choices = range(1, most + 1) if config.passes == "auto" else [config.passes]
    parts = {passes: groups(targets, passes) for passes in choices}
    devices = []
    for device in gpus or [torch.device("cpu")]:
        here = {
            name: sum(moments[name]) for name, t in targets.items() if t.weight.device == device
        }
        fixed = per_sample = total = free_here = None
        if device in free:
            total = torch.cuda.mem_get_info(device)[1]
            free_here = free[device] - int(_RESERVE * total)
            first, last = probe.peaks[0][device], probe.peaks[-1][device]
            # 1 and 2: a straight line through both. Else everything grows with the samples.
            slope = max(last - first, 0) if probe.sizes == (1, 2) else -(-last // probe.sizes[-1])
            fixed = max(last - slope * probe.sizes[-1], 0)
            per_sample = slope + probe.rows * _handed_on(targets, here)
        devices.append(
            DevicePlan(
                device=str(device),
                total=total,
                free=free_here,
                weights=_weights(peft_model, device),
                moments=sum(here.values()),
                moments_at_a_time={
                    passes: max(sum(here.get(name, 0) for name in part) for part in found)
                    for passes, found in parts.items()
                },
                fixed=fixed,
                per_sample=per_sample,
                selection=_selection([targets[name] for name in here], probe.shared_input),
            )
        )
    cap = max(1, (MOST_TOKENS if gpus else CPU_TOKENS) // length)
    if config.samples is not None:
        cap = min(cap, config.samples)
    passes, chosen = _choose(devices, choices, batch_size, cap, length, bool(gpus))
    if tokens is None and config.samples is not None:
        tokens = config.samples * length
    seconds = None
    if tokens is not None:
        samples = tokens / length
        seconds = samples * probe.seconds * (passes + _relative_cost(targets, moments, bool(gpus)))
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


def _choose(
    devices: Sequence[DevicePlan],
    choices: Sequence[int],
    batch_size: int | Literal["auto"],
    cap: int,
    length: int,
    gpus: bool,
) -> tuple[int, int]:
    """Passes and batch size: as few passes as leave room for a batch that is worth it."""
    worth = cap if cap * length < _FEW_TOKENS else -(-_FEW_TOKENS // length)
    for least in (worth, 1) if batch_size == "auto" else (batch_size,):
        for passes in choices if gpus else choices[:1]:
            room = min(device.largest_batch(passes) for device in devices)
            if room >= least:
                return passes, min(room, cap) if batch_size == "auto" else batch_size
    return choices[-1], 1 if batch_size == "auto" else batch_size


@dataclass(frozen=True)
class _Probe:
    sizes: tuple[int, ...]  # samples of each run
    peaks: list[dict[torch.device, int]]  # bytes above what was there before, of each run
    seconds: float  # a sample, of the faster run
    rows: int  # of the largest input of a target, for one sample
    shared_input: dict[str, str]


def _probe(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    sizes: tuple[int, ...],
    gpus: Sequence[torch.device],
) -> _Probe:
    """Forward and backward of the batch's first samples, as in the pass but without moments."""
    before = {device: torch.cuda.memory_allocated(device) for device in gpus}
    everything = dataclasses.replace(config, samples=None)
    seconds = math.inf
    peaks: list[dict[torch.device, int]] = []
    with _watched(targets, config) as (shared_input, rows), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pass itself will say it
        for size in sizes:
            for device in gpus:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            try:
                collect_moments(
                    peft_model,
                    targets,
                    [first_samples(batch, size)],
                    everything,
                    forward_fn,
                    show_progress_bar=False,
                    counted=frozenset(),
                    gradient_scale=1.0,
                )
            except OutOfMemoryError:
                if not peaks:
                    raise
                break  # what one sample needs is known
            for device in gpus:
                torch.cuda.synchronize(device)
            seconds = min(seconds, (time.perf_counter() - start) / size)
            peaks.append({d: torch.cuda.max_memory_allocated(d) - before[d] for d in gpus})
    if len(peaks) < len(sizes):
        gc.collect()  # the error's frames hold the graph
    most = -(-max(rows.values(), default=0) // sizes[0])
    return _Probe(sizes[: len(peaks)], peaks, seconds, most, shared_input)


@contextmanager
def _watched(
    targets: dict[str, Target], config: FiletConfig
) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Of each module's first call: whose input moment it will share, and the rows of its input."""
    shared_input: dict[str, str] = {}
    rows: dict[str, int] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def watch(target: Target, module: nn.Module, args: tuple[Any, ...]) -> None:
        if target.name in rows or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        rows[target.name] = x.shape[:-1].numel()
        reference, leader = seen.get(id(x), (None, ""))
        if config.share_inputs and reference is not None and reference() is x:
            shared_input[target.name] = leader
        elif target.weight.shape[1] <= target.weight.shape[0]:  # its moment is of x itself
            seen[id(x)] = (weakref.ref(x), target.name)

    handles = [
        target.base.register_forward_pre_hook(bound(watch, target)) for target in targets.values()
    ]
    try:
        yield shared_input, rows
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _gpus(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _by_device(
    targets: dict[str, Target], by_block: Mapping[str, list[str]]
) -> dict[torch.device, list[str]]:
    found: dict[torch.device, list[str]] = {}
    for block, names in by_block.items():
        found.setdefault(targets[names[0]].weight.device, []).append(block)
    return found


def _length(batch: Any) -> int:
    """Tokens of a sample; 1 where the batch has no sequence (images, say)."""
    entry = batch.get("input_ids") if isinstance(batch, Mapping) else None
    candidates = [entry] if isinstance(entry, Tensor) else list(tensors_in(batch))
    ids = next((t for t in candidates if t.dim() > 1 and not t.is_floating_point()), None)
    return 1 if ids is None else ids.shape[1]


def _weights(model: nn.Module, device: torch.device) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device == device}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _handed_on(targets: dict[str, Target], here: Mapping[str, int]) -> int:
    """Bytes a token of y or h, one module at a time: float32, then |y| or scaled float16 beside."""
    sides = [
        min(targets[name].weight.shape)
        for name in here
        if targets[name].weight.shape[0] != targets[name].weight.shape[1]
    ]
    return 8 * max(sides, default=0)


def _selection(targets: Sequence[Target], shared_input: Mapping[str, str]) -> int:
    """Bytes of :func:`filet_kernels.fisher_energies`, the largest layer's, and of A and B.

    On a GPU four matrices of a moment's size, the weight's float16 parts and two slices of 64 MiB;
    else Gram matrices and copies of the weight in float64. A and B need less after that, one copy
    of the weight.
    """
    most = factors = 0
    for target in targets:
        m, n = target.weight.shape
        item = 8 if target.weight.dtype == torch.float64 else 4
        d = n if target.name in shared_input else min(m, n)
        if item == 8 or not target.weight.is_cuda:
            energies = 8 * (4 * m * n + 2 * d**2)
        else:
            energies = 16 * d**2 + 4 * m * n + 2**27
        most = max(most, energies)
        factors += item * target.rank * (m + n)
    return most + factors


def _relative_cost(
    targets: dict[str, Target], moments: Mapping[str, tuple[int, int]], gpus: bool
) -> float:
    """Operations of the moments over those of the layers' forward and backward.

    A token costs a layer 4 m n, a moment of size d half of 2 d² where only the lower triangle is
    formed (on a GPU, where y and h come from the layers' own products). On a CPU they are formed
    once more and the products are whole.
    """
    layers = extra = 0
    for name, target in targets.items():
        m, n = target.weight.shape
        layers += 4 * m * n
        for size, anew in zip(moments[name], (m < n, n < m), strict=True):
            if size:
                extra += min(m, n) ** 2 * (1 if gpus else 2)
                extra += 2 * m * n if anew and not gpus else 0
    return extra / layers
