"""What a batch needs, measured: one and two samples go forward and backward, without moments.

What the forward keeps for the backward, and what the loss and the attention need besides, depends
on the model's code. Which modules share an input shows on the way.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from filet.collect.hooks import bound
from filet.collect.run import collect_moments
from filet.collect.sharing import SharedInputs
from filet.config import FiletConfig
from filet.loss.batch import ForwardFn
from filet.model.batch import first_samples, is_divisible, samples_in
from filet.model.targets import Target
from filet.system.memory import OutOfMemoryError

__all__ = ["Probe", "gpus_of", "is_compiled", "probed", "sizes_to_try"]


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        sizes: samples of each run.
        peaks: bytes above what was there before, of each run, by device.
        seconds: a sample, of the faster run.
        rows: of the largest input of a target, for one sample.
        shared_input: module → the module whose input moment it will share.
    """

    sizes: tuple[int, ...]
    peaks: list[dict[torch.device, int]]
    seconds: float
    rows: int
    shared_input: dict[str, str]

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Bytes of a batch on a device: fixed, and for each sample."""
        first, last = self.peaks[0][device], self.peaks[-1][device]
        # 1 and 2: a straight line through both. Else everything grows with the samples.
        slope = max(last - first, 0) if self.sizes == (1, 2) else -(-last // self.sizes[-1])
        return max(last - slope * self.sizes[-1], 0), slope


def sizes_to_try(model: nn.Module, batch: Any) -> tuple[int, int]:
    """Samples of the two runs: one and two, or where the batch has to stay whole, all twice."""
    given = samples_in(batch)
    divisible = given > 1 and is_divisible(batch) and not is_compiled(model)
    return (1, 2) if divisible else (given, given)


def probed(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batch: Any,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    gpus: Sequence[torch.device],
) -> Probe:
    """Forward and backward of the batch's first samples, as in the pass but without moments."""
    sizes = sizes_to_try(peft_model, batch)
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
    return Probe(sizes[: len(peaks)], peaks, seconds, most, shared_input)


@contextmanager
def _watched(
    targets: dict[str, Target], config: FiletConfig
) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Of each module's first call: whose input moment it will share, and the rows of its input."""
    inputs = SharedInputs()
    rows: dict[str, int] = {}

    def watch(target: Target, module: nn.Module, args: tuple[Any, ...]) -> None:
        if target.name in rows or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        rows[target.name] = x.shape[:-1].numel()
        owner = inputs.owner(x) if config.share_inputs else None
        if owner is not None:
            inputs.of[target.name] = owner
        elif target.shape[1] <= target.shape[0]:  # its moment is of x itself
            inputs.own(x, target.name)

    handles = [
        target.base.register_forward_pre_hook(bound(watch, target)) for target in targets.values()
    ]
    try:
        yield inputs.of, rows
    finally:
        for handle in handles:
            handle.remove()


def is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def gpus_of(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
