"""The pass over the data: forward, backward, and the second moments taken on the way.

x is there in a module's forward and g in its backward: each moment is accumulated where its
vector exists anyway, and nothing is kept. y = Wx and h = Wᵀg are needed before they are rounded: on
a GPU the module's own products give them (:class:`_Linear`), elsewhere they are formed once more.
Weights stay frozen, so no weight gradient is ever computed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm import tqdm

from filet.checks import Inputs
from filet.config import FiletConfig
from filet.forwards import Forwards
from filet.fused import fused
from filet.head import ChunkedLoss, HeadLoss
from filet.loss import IGNORED, ModelLoss, SummedLoss, ids_shape, rows_may_be_samples
from filet.memory import named_shortage
from filet.targets import Target
from filet.transfer import values
from filet_kernels import Moments, SecondMoment, syrk_
from filet_kernels.product import exact_float32, power_of_two
from filet_kernels.rounded import rounded_and_scaled

__all__ = [
    "HANDS_ON",
    "ForwardFn",
    "MomentHooks",
    "check_terms",
    "collect_moments",
    "empty_moments",
    "first_samples",
    "is_divisible",
    "preserved",
    "samples_in",
    "some",
    "token_masks",
    "warn_of_padding",
    "without_token_mask",
]

ForwardFn = Callable[[Any, Any], Any]

# Loss scale where gradients are float16: the largest |g| of the first batch is put at 2⁴. That
# leaves 2¹² of room below the largest float16 (65504), and 2¹⁸ above its smallest normal number.
_FP16_PEAK = 2.0**4
# Where another gradient on the way, the logits', say, overflows before that: this far below it.
_FP16_ROOM = 2.0**5

# By which transformers asks the flash-attn package, which does not listen to torch, for a backward
# without atomics. Read at every call.
_FLASH_ATTENTION = "FLASH_ATTENTION_DETERMINISTIC"

# Where a linear layer in bfloat16 or float16 hands y and h on before it rounds them.
HANDS_ON = {"cuda"}

# They enter their moments as float16, each column scaled by a power of two that puts the largest
# number of the first batch at 2 to 4. That leaves 2¹⁴ of room, and 11 bits to what is 2⁻¹⁶ of it.
# Rows beyond that room are left out, and added by a smaller scale in a second run of their batch.
_UNROUNDED_PEAK = 2.0
# Of a column that was zero in the first batch: so whatever comes is beyond, and sets the scale.
_UNKNOWN_SCALE = 2.0**100


_OnHost = tuple[Tensor, torch.cuda.Event | None]  # flags, and when they are there


@dataclass(frozen=True)
class _Awaited:
    """The check of a batch, on its way to the host."""

    where: str
    checks: list[tuple[str, SecondMoment]]
    places: list[list[int]]  # in checks, of each kind of moment
    fine: list[_OnHost]  # of each kind

    @property
    def waits(self) -> bool:
        return any(event is not None for _, event in self.fine)


@dataclass(frozen=True)
class _Run:
    """A batch that went through: whether moments lack rows of it, and how it goes through again."""

    left_out: dict[int, list[Tensor]]  # of each moment (by id), call by call: the rows
    flags: list[_OnHost]  # of each device; by slots
    again: Callable[[], object]


def _to_host(flags: Tensor) -> _OnHost:
    if not flags.is_cuda:
        return flags, None
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    with torch.cuda.device(flags.device):
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
    return host, event


class MomentHooks:
    """Hooks on the base modules of the targets that accumulate each one's :class:`Moments`.

    The input side is counted while ``phase`` is "forward", which is once also under gradient
    checkpointing, whose recomputation runs in the backward. The output side is counted when the
    gradient arrives, which is once as well: of the two forward runs only one is differentiated.

    ``counted`` names the targets whose moments are taken, all by default. The others are watched
    only by the probe: the loss scale is that of the whole model.
    """

    def __init__(
        self,
        targets: dict[str, Target],
        config: FiletConfig,
        counted: Collection[str] | None = None,
    ) -> None:
        self.targets = targets
        self.config = config
        self.counted = targets.keys() if counted is None else counted
        self.moments: dict[str, Moments] = {}
        self.shared_input: dict[str, str] = {}  # module -> the module whose input moment it uses
        self.phase = "idle"  # "forward" | "backward" | "probe"
        self.counting = True  # False: the products of a forward that counts, but no moment of them
        self.gradient_scale = 1.0  # what g and h of this batch are multiplied by
        self.half = False  # a target gave float16, and so will its gradient be
        self.peaks: list[Tensor] = []  # of a probe: max |g| of each gradient that arrived
        # Modules whose rows the attention mask could not be put to, and how many of a sample.
        self.unmasked: dict[str, int] = {}
        self._masks: dict[str, Tensor | None] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, SecondMoment]] = {}
        self._calls: dict[str, int] = {}
        self._mask_counts: dict[str, int] = {}
        # Rows of each moment. On the host: 9 additions a block and batch would be 9 launches.
        self._counted: dict[int, tuple[SecondMoment, int]] = {}
        self._scales: dict[int, tuple[SecondMoment, Tensor]] = {}  # of the columns of y and h
        self._slots: dict[int, int] = {}  # of those moments, in the flags of a device
        self._flags: dict[torch.device, Tensor] = {}  # of this batch: a moment lacks rows of it
        self._left_out: dict[int, list[Tensor]] = {}
        self._missing: dict[int, list[Tensor]] | None = None  # in a second run: what to add
        self._runs: list[_Run] = []
        self._handles: list[Any] = []
        self._awaited: _Awaited | None = None
        self._forwards = Forwards()

    def __enter__(self) -> MomentHooks:
        for target in self.targets.values():
            module = target.base
            if type(module) is nn.Linear and self._forwards.own(module) is not None:
                self._forwards.replace(module, _bound(self._forward, target))
            self._handles.append(
                target.base.register_forward_pre_hook(_bound(self._before, target))
            )
            self._handles.append(target.base.register_forward_hook(_bound(self._after, target)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forwards.restore()
        self._seen.clear()

    def finish(self) -> None:
        """Take the scales of y and h back out of their moments, and write the counts into them."""
        assert not self._runs  # what they lack is added while the hooks are there
        self.judge()
        for moment, scale in self._scales.values():
            moment.sum.div_(scale).div_(scale.unsqueeze(1))
        self._scales.clear()
        for moment, count in self._counted.values():
            moment.count += count
        self._counted.clear()

    def start_batch(self, masks: dict[str, Tensor | None]) -> None:
        """``masks`` (B, T) of the tokens to count: "encoder" and "decoder"; None counts all."""
        self._masks = masks
        self._mask_counts = {k: int(m.sum()) for k, m in masks.items() if m is not None}
        self._seen.clear()
        self._calls.clear()
        self._flags, self._left_out = {}, {}

    def finish_batch(self, index: int, again: Callable[[], object]) -> None:
        """Look for what is wrong with this batch, and mend or raise it, on a GPU one batch later.

        By then the answer has arrived, so that the GPU need not run dry for it. ``again`` runs this
        batch forward and backward once more.
        """
        self.check_sharing(index)
        earlier = len(self._runs)
        self.note_run(again)
        self.judge()
        self.add_left_out(earlier)
        self._awaited = self._check(f"batch {index} (counted from 0)")
        if not self._awaited.waits:
            self.judge()

    def note_run(self, again: Callable[[], object]) -> None:
        """Keep, of the batch that just went through, which rows its moments lack."""
        if self._left_out:
            flags = [_to_host(flags) for flags in self._flags.values()]
            self._runs.append(_Run(self._left_out, flags, again))

    def add_left_out(self, runs: int | None = None) -> None:
        """Add the rows that were left out of the first ``runs`` runs noted, of all by default.

        Those were beyond float16 by the scale of their moments. Their batch goes through again, for
        them alone, the moments and they scaled down by powers of two, which changes no bit.
        """
        settled, self._runs = self._runs[:runs], self._runs[len(self._runs[:runs]) :]
        for run in settled:
            flagged: set[int] = set()
            for flags, event in run.flags:
                if event is not None:
                    event.synchronize()
                flagged.update(flags.nonzero().flatten().tolist())
            missing = {k: rows for k, rows in run.left_out.items() if self._slots[k] in flagged}
            if missing:
                self.counting, self._missing = False, missing
                run.again()
                self.counting, self._missing = True, None

    def check_sharing(self, index: int) -> None:
        """Raise where modules that shared an input did not in this batch. No synchronisation."""
        for follower, leader in self.shared_input.items():
            if self._calls.get(follower, 0) != self._calls.get(leader, 0):
                raise _sharing_broke(follower, leader, index)
        self._seen.clear()

    def check_finite(self, where: str) -> None:
        """Raise for a NaN or infinity in any moment. One device synchronisation a device."""
        self._awaited = self._check(where)
        self.judge()

    def _check(self, where: str) -> _Awaited:
        names = list(self.moments)
        # The first module of the forward, then the first of the backward, is where it began.
        checks = [(name, self.moments[name].input) for name in names]
        checks += [(name, self.moments[name].output) for name in reversed(names)]
        alike: dict[tuple[torch.device, int], dict[int, int]] = {}
        for position, (_, moment) in enumerate(checks):
            of_kind = alike.setdefault((moment.sum.device, moment.sum.shape[0]), {})
            of_kind.setdefault(id(moment), position)
        fine = []
        for of_kind in alike.values():
            # A NaN or infinity in any counted row stays on the diagonal, the sum of squares.
            diagonals = torch.stack([checks[p][1].sum.diagonal() for p in of_kind.values()])
            fine.append(_to_host(diagonals.isfinite().all(1)))
        places = [list(of_kind.values()) for of_kind in alike.values()]
        return _Awaited(where, checks, places, fine)

    def judge(self) -> None:
        """Raise for the last batch whose check has not been looked at."""
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return
        bad: list[int] = []
        for positions, (flags, event) in zip(awaited.places, awaited.fine, strict=True):
            if event is not None:
                event.synchronize()
            bad += [p for p, fine in zip(positions, flags.tolist(), strict=True) if not fine]
        if bad:
            name, moment = awaited.checks[min(bad)]
            where = {"x": "its input", "y": "its output"}.get(
                moment.space, "the gradient it received"
            )
            raise FloatingPointError(
                f"{name}: {where} has a NaN or infinity in {awaited.where}; "
                "expected finite values (check that batch, and the model's dtype)"
            )

    # The hooks.

    def _before(self, target: Target, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{target.name} was called with {type(args[0]).__name__ if args else 'no'} "
                "positional input; expected a tensor, or target_modules without it"
            )
        x = args[0]
        if self.phase == "forward" and target.name in self.counted:
            self._count_input(target, x)
        if x.requires_grad or not torch.is_grad_enabled():
            return None
        # The first target on its path: gradients start here.
        return (x.detach().requires_grad_(), *args[1:])

    def _after(self, target: Target, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{target.name} returned a {type(output).__name__}; expected a tensor, as a linear "
                "layer returns it, or target_modules without it"
            )
        self.half = self.half or output.dtype == torch.float16
        if output.requires_grad:
            output.register_hook(_bound(self._gradient, target, self._hands_on(target, args[0])))

    def _forward(self, target: Target, x: Tensor) -> Tensor:
        """What nn.Linear does, with y and h handed on where a moment is of them."""
        if self._hands_on(target, x):
            return _Linear.apply(x, self, target)
        return F.linear(x, target.base.weight, target.base.bias)

    def _hands_on(self, target: Target, x: Tensor) -> bool:
        moments, weight = self.moments.get(target.name), target.weight
        return (
            moments is not None
            and (moments.input.space == "y" or moments.output.space == "h")
            and target.base in self._forwards
            and weight.device.type in HANDS_ON  # where a device map brings x, if it is elsewhere
            and x.dtype == weight.dtype
            and x.dtype in (torch.bfloat16, torch.float16)
            and not torch.is_autocast_enabled(weight.device.type)
        )

    def take_y(self, target: Target, x: Tensor) -> Tensor | None:
        """The layer's output, after x Wᵀ entered its moment; None where that is not of y.

        Also where it does not enter: the forward that gradient checkpointing runs once more has to
        take the same product, or the gradients are of other activations (25 of 204,800 elements of
        a layer's output differed).
        """
        moment = self.moments[target.name].input
        if moment.space != "y":
            return None
        y = _unrounded(x, target.weight.T, torch.float32)
        enters = self.phase == "forward"
        return self._add_unrounded(target, moment, y, x.dtype, enters, bias=target.bias)

    def take_h(self, target: Target, gradient: Tensor) -> Tensor | None:
        """The input's gradient g W, after it entered its moment; None as for :meth:`take_y`."""
        moment = self.moments[target.name].output
        if moment.space != "h":
            return None
        h = _unrounded(gradient, target.weight, torch.float32)
        enters, alpha = self.phase == "backward", self.gradient_scale**-2
        return self._add_unrounded(target, moment, h, gradient.dtype, enters, alpha=alpha)

    def _add_unrounded(
        self,
        target: Target,
        moment: SecondMoment,
        v: Tensor,
        dtype: torch.dtype,
        enters: bool,
        *,
        bias: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Tensor:
        """Adds the rows v to a moment, scaled, if they enter; returns v + bias in ``dtype``."""
        key = id(moment)
        if enters and self._missing and self._missing.get(key):
            self._add_beyond(target, moment, v, self._missing[key].pop(0), alpha)
        if not enters or not self.counting:
            return (v if bias is None else v + bias).to(dtype)
        if v.numel() and key not in self._scales:
            weights = self._rows(target, v)[1]
            largest = _largest(v, weights)
            # Where these rows say nothing of a column, what they say of the others.
            largest = torch.where(largest > 0, largest, largest.amax())
            self._scales[key] = moment, _scale_for(largest)
        scale = self._scales[key][1] if v.numel() else v.new_ones(v.shape[-1])
        rounded, scaled, left_out = rounded_and_scaled(
            v, scale, bias=bias, dtype=dtype, flag=self._flag(moment, v.device)
        )
        self._left_out.setdefault(key, []).append(left_out)
        self._add(target, moment, scaled, alpha=alpha)
        return rounded

    def _flag(self, moment: SecondMoment, device: torch.device) -> Tensor:
        """Where it is noted that this moment lacks a row of the batch."""
        if device not in self._flags:
            slots = 2 * len(self.targets)
            self._flags[device] = torch.zeros(slots, dtype=torch.int32, device=device)
        return self._flags[device][self._slots.setdefault(id(moment), len(self._slots))]

    def _add_beyond(
        self, target: Target, moment: SecondMoment, v: Tensor, left_out: Tensor, alpha: float
    ) -> None:
        """Adds the rows of v that were left out, all by the scale that they need."""
        rows, weights = self._rows(target, v)
        left_out = left_out.view(rows.shape[:-1])
        weights = left_out if weights is None else left_out & weights
        before = self._scales[id(moment)][1]
        scale = torch.minimum(before, _scale_for(_largest(rows, weights)))
        moment.sum.mul_(scale / before).mul_((scale / before).unsqueeze(1))
        self._scales[id(moment)] = moment, scale
        syrk_(moment.sum, (rows * scale).half(), alpha=alpha, weights=weights)

    def _count_input(self, target: Target, x: Tensor) -> None:
        name = target.name
        self._calls[name] = self._calls.get(name, 0) + 1
        reference, version, moment = self._seen.get(id(x), (None, 0, None))
        if reference is not None and (reference() is not x or version != _version(x)):
            moment = None  # another tensor that has died since, or this one was written to
        if name not in self.moments:
            share = moment if self.config.share_inputs else None
            # Where nothing is counted, only the spaces matter.
            device = None if self.counting else "meta"
            self.moments[name] = empty_moments(target.weight, share, device)
            if share is not None:
                self.shared_input[name] = next(
                    other for other, m in self.moments.items() if m.input is share
                )
        mine = self.moments[name].input
        if name in self.shared_input:
            if moment is not mine:
                raise _sharing_broke(name, self.shared_input[name], None)
        elif mine.space == "x":
            self._add(target, mine, x.detach())
            self._seen[id(x)] = (weakref.ref(x), _version(x), mine)
        elif not self._hands_on(target, x):
            self._add(target, mine, _unrounded(x.detach(), target.weight.T, mine.sum.dtype))

    def _gradient(self, target: Target, handed_on: bool, gradient: Tensor) -> None:
        if self.phase == "probe":
            rows, weights = self._rows(target, gradient.detach())
            peak = rows.abs().amax(-1)
            if weights is not None:
                peak = torch.where(weights, peak, 0)
            self.peaks.append(peak.max() if peak.numel() else peak.sum())
        elif self.phase == "backward" and target.name in self.counted:
            output = self.moments[target.name].output
            v = gradient.detach()
            if output.space == "h":
                if handed_on:
                    return
                v = _unrounded(v, target.weight, output.sum.dtype)
            self._add(target, output, v, alpha=self.gradient_scale**-2)

    def _add(self, target: Target, moment: SecondMoment, v: Tensor, *, alpha: float = 1.0) -> None:
        if not self.counting:
            return
        rows, weights = self._rows(target, v)
        count = rows.shape[:-1].numel()
        if weights is not None:
            count = self._mask_counts[self._side(target.name)]
        self._counted[id(moment)] = (moment, self._counted.get(id(moment), (moment, 0))[1] + count)
        device = moment.sum.device
        if rows.device != device:
            rows, weights = rows.to(device), None if weights is None else weights.to(device)
        with torch.no_grad():
            syrk_(moment.sum, rows, alpha=alpha, weights=weights)

    def _rows(self, target: Target, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """v as rows (…, T, d) that :func:`syrk_` takes, and which of them count."""
        rows = v.unsqueeze(0) if v.dim() == 1 else v if v.dim() <= 3 else v.flatten(0, -2)
        side = self._side(target.name)
        mask = self._masks.get(side)
        if mask is None:
            return rows, None
        if mask.device != v.device:
            self._masks[side] = mask = mask.to(v.device, non_blocking=True)
        if rows.shape[:-1] == mask.shape:
            return rows, mask
        if rows.shape[:-1] == (mask.numel(),):
            return rows, mask.flatten()
        if rows.shape[:-1] != mask.shape[:1]:  # one row a sample (a pooler) always counts
            self.unmasked[target.name] = rows.shape[-2]
        return rows, None

    def _side(self, name: str) -> str:
        """Whose tokens a module of an encoder-decoder sees; "decoder" where there is one side."""
        if "encoder" not in self._masks:
            return "decoder"
        parts = name.split(".")
        if _crosses(parts):
            return "encoder" if _is_key_or_value(parts) else "decoder"
        return "encoder" if "encoder" in parts and "decoder" not in parts else "decoder"


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b and h = g W of a frozen layer, both handed on before they are rounded.

    The matrix unit has them in float32 anyway. Rounded to the model's bfloat16 first, they would
    change choices (docs/accuracy.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, hooks: MomentHooks, target: Target) -> Tensor:
        ctx.hooks, ctx.target = hooks, target
        y = hooks.take_y(target, x)
        return F.linear(x, target.base.weight, target.base.bias) if y is None else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h = ctx.hooks.take_h(ctx.target, gradient)
        return gradient @ ctx.target.weight if h is None else h, None, None


def _crosses(parts: list[str]) -> bool:
    """Whether a module's path is one of cross-attention."""
    return any(word in part for part in parts for word in ("EncDec", "encoder_attn", "cross"))


def _is_key_or_value(parts: list[str]) -> bool:
    return parts[-1].lower()[:1] in ("k", "v")


def _largest(v: Tensor, weights: Tensor | None) -> Tensor:
    """Of the rows that count, the largest number of each column."""
    rows = v.abs()
    if weights is not None:
        rows = torch.where(weights.view(*rows.shape[:-1], 1), rows, 0)
    return rows.flatten(0, -2).amax(0)


def _scale_for(largest: Tensor) -> Tensor:
    power = power_of_two(largest)
    return torch.where(power > 0, _UNROUNDED_PEAK / power, _UNKNOWN_SCALE)


def empty_moments(
    weight: Tensor,
    shared_input: SecondMoment | None = None,
    device: torch.device | str | None = None,
) -> Moments:
    """Accumulators for a layer with this weight: float32 sums, float64 for a float64 weight.

    On the weight's device by default.
    """
    return Moments.zeros(
        (weight.shape[0], weight.shape[1]),
        dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        device=weight.device if device is None else device,
        input=shared_input,
    )


@torch.no_grad()
def _unrounded(v: Tensor, M: Tensor, dtype: torch.dtype) -> Tensor:
    """v M in ``dtype``, not rounded to the model's: y = x Wᵀ (without bias) and h = g W.

    The module's own output and input gradient would do, but for that rounding. On SmolLM2-135M in
    bfloat16 it moved the selected energies by up to 6.3e-3 through y and 6.5e-4 through h, and
    changed choices through both (docs/accuracy.md).
    """
    v = v.to(M.device)  # where a device map left the input elsewhere
    with torch.autocast(v.device.type, enabled=False):
        if v.is_cuda and v.dtype == M.dtype and v.dtype in (torch.bfloat16, torch.float16):
            rows = torch.mm(v.reshape(-1, v.shape[-1]), M, out_dtype=dtype)
            return rows.view(*v.shape[:-1], M.shape[1])
        with exact_float32():
            return v.to(dtype) @ M.to(dtype)


def _version(x: Tensor) -> int:
    """How often x was written to in place."""
    return 0 if x.is_inference() else x._version


def _bound(method: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """``method`` with its first arguments fixed, as a plain function that torch can hook.

    torch.compile leaves it alone: what a hook counts changes with every batch, and compiled anew
    each time it would run into Dynamo's limit (18 s of a pass over one small Llama, then 9.5).
    """
    bound: Callable[..., Any] = torch.compiler.disable(lambda *args: method(*first, *args))
    return bound


def _sharing_broke(follower: str, leader: str, batch: int | None) -> ValueError:
    where = "" if batch is None else f" in batch {batch}"
    return ValueError(
        f"{follower} took the same input tensor as {leader} at first, but not{where} later; "
        "expected FiletConfig(share_inputs=False) for a model that changes its data flow"
    )


def collect_moments(
    peft_model: PeftModel,
    targets: dict[str, Target],
    dataloader: Iterable[Any],
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    counted: Collection[str] | None = None,
    gradient_scale: float | None = None,
    title: str = "FILet statistics",
) -> tuple[MomentHooks, dict[str, int]]:
    """Run the samples forward and backward; returns the hooks' moments and the counts.

    The model must be inside :func:`preserved`. Counts: "samples", "tokens", "loss_terms".
    ``counted``: the targets whose moments are taken, all by default. ``gradient_scale``: what an
    earlier pass over the same batches found (its hooks keep it); None finds it.
    """
    base_model = peft_model.base_model.model
    summed_loss = SummedLoss(config, base_model)
    head_loss = HeadLoss(config, peft_model, summed_loss, forward_fn)
    inputs = Inputs(base_model, forward_fn)
    model_config = getattr(base_model, "config", None)
    if forward_fn is None and getattr(model_config, "return_dict", True) is False:
        raise ValueError(
            "return_dict=False in the model's config; expected True, or a forward_fn(model, batch) "
            "that returns (loss, terms) with loss their mean"
        )
    default, forward_fn = forward_fn is None, forward_fn or _default_forward
    device = _input_device(base_model)
    is_encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
    counts = {"samples": 0, "tokens": 0, "loss_terms": 0}
    scale = gradient_scale
    index, batch = -1, None  # for the message of a shortage

    def through(host: Any, masks: dict[str, Tensor | None]) -> int:
        """One batch forward and backward; returns the terms of its loss."""
        nonlocal scale
        batch = _to_device(host, device)
        given = without_token_mask(batch, config.token_mask) if default else batch
        hooks.start_batch(masks)
        hooks.phase = "forward"
        loss: ChunkedLoss | ModelLoss | None = None
        if head_loss.takes(given):
            loss = head_loss(given, host)
            hooks.phase = "idle"  # if it goes through once more, its inputs are counted already
        if loss is None:
            loss = summed_loss(forward_fn(peft_model, given), batch)
        if scale is None and loss.terms:
            scale = _loss_scale(hooks, loss, index) if hooks.half else 1.0
        hooks.phase = "backward"
        hooks.gradient_scale = scale or 1.0  # none yet: no term, and every gradient is zero
        _backward(loss, hooks.gradient_scale, index)
        hooks.phase = "idle"
        return loss.terms

    progress = tqdm(
        total=_expected_samples(dataloader, config.samples),
        unit="sample",
        desc=title,
        disable=not show_progress_bar,
    )
    with (
        progress,
        MomentHooks(targets, config, counted) as hooks,
        named_shortage("pass", lambda: _place(hooks, index, batch)),
    ):
        for index, batch in enumerate(dataloader):
            batch = inputs.checked(batch, index)
            if config.samples is not None:
                batch = first_samples(batch, config.samples - counts["samples"])
            size = samples_in(batch)
            if size == 0:
                continue
            masks, tokens = token_masks(batch, size, is_encoder_decoder, config.token_mask)
            if counts["samples"] == 0 and not default:
                _warn_of_other_masks(batch, config.token_mask)
            batch = summed_loss.without_padded_terms(batch, masks["decoder"])
            inputs.check_labels(batch, index, summed_loss.shift)
            terms = through(batch, masks)
            hooks.finish_batch(index, partial(through, batch, masks))
            counts["samples"] += size
            counts["tokens"] += tokens
            counts["loss_terms"] += terms
            progress.update(size)
            elapsed = progress.format_dict["elapsed"]
            if elapsed:
                progress.set_postfix_str(f"{counts['tokens'] / elapsed:,.0f} tokens/s")
            if config.samples is not None and counts["samples"] >= config.samples:
                break
        hooks.add_left_out()
        progress.total = counts["samples"]
    if counts["samples"] == 0:
        raise ValueError("the dataloader gave no sample; expected at least one")
    check_terms(counts["samples"], counts["loss_terms"])
    hooks.finish()
    for moments in hooks.moments.values():
        # Of the whole run, also for a module (an expert) that only later batches reached.
        moments.loss_terms.fill_(counts["loss_terms"])
    padded = {name for name, rows in hooks.unmasked.items() if _is_padded(base_model, name, rows)}
    warn_of_padding(sorted(padded))
    return hooks, counts


def check_terms(samples: int, terms: int) -> None:
    """An error where the loss has no term: then every gradient is zero, and every energy."""
    if not terms:
        raise ValueError(
            f"no position of the {samples} samples has a label (all labels are {IGNORED}, or stand "
            "where nothing predicts them); expected labels, of 2 tokens or more in a causal model"
        )


def warn_of_padding(unmasked: list[str]) -> None:
    if unmasked:
        warnings.warn(
            f"{some(unmasked)}: the rows of their inputs do not follow the batch's "
            "attention_mask, so padding counts there like any token; expected batches without "
            "padding (of one sample, say)",
            stacklevel=4,
        )


def _is_padded(model: nn.Module, name: str, rows: int) -> bool:
    """Whether a module that is given so many rows may see what the batch's mask leaves out.

    Beside a text's part, those of images and sounds, and what brings theirs to it (projections,
    keys and values across), see only what is there. Whisper's encoder is given as many frames with
    every sample.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    path = name.split(".")
    across = _crosses(path) and _is_key_or_value(path)
    if across and not getattr(config, "is_encoder_decoder", False):
        return False
    parts = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    configs: list[Any] = [getattr(part, "config", None) for part in parts]
    nearest = next(each for each in configs if hasattr(each, "get_text_config"))
    if type(nearest) is not type(config):
        return hasattr(nearest, "vocab_size")
    filled = rows == getattr(config, "max_source_positions", None)
    return config.get_text_config() is config and not filled


def _warn_of_other_masks(batch: Any, token_mask: str | None) -> None:
    """A forward_fn may know of a mask that this library does not."""
    if token_mask != "attention_mask" or not isinstance(batch, Mapping) or token_mask in batch:
        return
    others = [
        key
        for key, value in batch.items()
        if "mask" in str(key) and isinstance(value, Tensor) and value.dim() > 1
    ]
    if others:
        warnings.warn(
            f"the batch has {others[0]!r} and no attention_mask, so padding counts like any token; "
            f"expected FiletConfig(token_mask={others[0]!r}), or token_mask=None if all count",
            stacklevel=4,
        )


_PHASES = {
    "forward": "the forward of batch {}",
    "backward": "the backward of batch {}",
    "probe": "the search for the loss scale of batch {}",
}


def _place(hooks: MomentHooks, index: int, batch: Any) -> str:
    """Where the pass is, for a message."""
    if hooks.phase not in _PHASES:
        return f"the pass after batch {index}" if index >= 0 else "the pass before its first batch"
    ids = next((t for t in _tensors(batch) if t.dim() > 1 and not t.is_floating_point()), None)
    length = "" if ids is None else f" × {ids.shape[1]} tokens"
    place = _PHASES[hooks.phase].format(index)
    samples = samples_in(batch)
    return f"{place} (counted from 0, {samples} sample{'s' * (samples != 1)}{length})"


def _backward(
    loss: ChunkedLoss | ModelLoss, scale: float, index: int, retain_graph: bool = False
) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no gradient: no target module took part in it, or "
            "forward_fn ran under torch.no_grad(); expected a loss that depends on the targets"
        )
    loss.backward(scale, retain_graph)


def _loss_scale(hooks: MomentHooks, loss: ChunkedLoss | ModelLoss, index: int) -> float:
    """The power of two that keeps float16 gradients away from underflow and overflow.

    Found by going backward through this batch's graph, which stays for the backward that counts.
    """
    hooks.phase = "probe"
    scale, ceiling = 1.0, math.inf
    for _ in range(12):
        hooks.peaks = []
        _backward(loss, scale, index, retain_graph=True)
        peak = max((float(peak) for peak in hooks.peaks), default=0.0, key=_nan_last)
        if not math.isfinite(peak):
            ceiling = scale = scale / _FP16_ROOM
            continue
        gain = 2.0 ** math.floor(math.log2(_FP16_PEAK / peak)) if peak else 2.0**12
        wanted = min(scale * gain, ceiling)
        if peak and wanted <= scale:
            return wanted
        scale = wanted
    hooks.check_finite(f"batch {index} (counted from 0)")  # names where a NaN of the forward began
    raise FloatingPointError(
        f"no loss scale keeps the float16 gradients of batch {index} finite and non-zero; expected "
        "a model in bfloat16 or float32, or a batch without NaN"
    )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _default_forward(model: Any, batch: Any) -> Any:
    return model(**batch)


def _input_device(model: nn.Module) -> torch.device:
    """Where the batch goes: the device of the first parameter (the embedding's, as a rule)."""
    return next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )


def _expected_samples(dataloader: Iterable[Any], samples: int | None) -> int | None:
    dataset = getattr(dataloader, "dataset", None)
    try:
        available = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return samples
    return available if samples is None else min(samples, available)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


def samples_in(batch: Any) -> int:
    """The first dimension of the ids, or of the first tensor where a batch has none."""
    entry = batch if isinstance(batch, Mapping) else {}
    named = [entry[key] for key in ("input_ids", "inputs_embeds") if key in entry]
    tensors = itertools.chain(_tensors(named), _tensors(batch))
    size = next((t.shape[0] for t in tensors if t.dim() > 0), None)
    if size is None:
        raise TypeError(
            f"the dataloader gave a {type(batch).__name__} without a tensor; expected a batch of "
            "tensors whose first dimension counts the samples"
        )
    return size


def is_divisible(batch: Any) -> bool:
    """Whether the rows of a batch's tensors are its samples, all of them, so that it can be cut.

    They are not where images of several samples lie in one tensor (``pixel_values`` of patches,
    with ``image_grid_thw``), or where positions in three dimensions, of height and width too, come
    first (``position_ids`` of 3, samples, tokens): such a batch goes through whole.
    """
    values = [batch] if isinstance(batch, Tensor) else batch
    if isinstance(batch, Mapping):
        ids = ids_shape(batch)
        if ids is not None and not all(rows_may_be_samples(*entry, ids) for entry in batch.items()):
            return False
        values = batch.values()
    full = samples_in(batch)
    return all(
        value.dim() == 0 or value.shape[0] == full
        if isinstance(value, Tensor)
        else not isinstance(value, (Mapping, list, tuple))
        for value in values
    )


def _map(batch: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        mapped = [_map(value, function) for value in batch]
        return type(batch)(*mapped) if hasattr(batch, "_fields") else type(batch)(mapped)
    return function(batch)


def first_samples(batch: Any, size: int) -> Any:
    """At most the first ``size`` samples of a batch; all of one that cannot be divided."""
    if size >= samples_in(batch) or not is_divisible(batch):
        return batch
    return _map(batch, lambda v: v[:size] if isinstance(v, Tensor) and v.dim() > 0 else v)


def _to_device(batch: Any, device: torch.device) -> Any:
    return _map(batch, lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v)


def token_masks(
    batch: Any, size: int, is_encoder_decoder: bool, token_mask: str | None
) -> tuple[dict[str, Tensor | None], int]:
    """Masks (B, T) of the tokens that count, by side, and how many tokens the batch has.

    ``token_mask`` is the entry of the batch that has them, see :class:`filet.FiletConfig`.
    """
    entry = batch if isinstance(batch, Mapping) else {}
    attention = None if token_mask is None else _mask(entry, token_mask)
    if attention is not None:
        tokens = int(attention.sum())
    else:
        ids = entry.get("input_ids")
        tokens = ids.numel() if isinstance(ids, Tensor) else size
    if not is_encoder_decoder:
        sides = {"decoder": attention}
    else:
        decoder = None if token_mask is None else _mask(entry, "decoder_attention_mask")
        labels = entry.get("labels")
        if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
            # The padding comes after the last label; what has none before that is a prompt.
            decoder = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        elif decoder is None and "decoder_input_ids" not in entry:
            decoder = attention  # a classifier, whose decoder takes the encoder's input
        sides = {"encoder": attention, "decoder": decoder}
    # A mask without a hole is dropped: the unweighted product is the cheaper one. Of several
    # choices a sample (B, C, T), models make as many samples.
    holed = {
        k: m.flatten(0, -2) if m is not None and not bool(m.all()) else None
        for k, m in sides.items()
    }
    return holed, tokens


def without_token_mask(batch: Any, token_mask: str | None) -> Any:
    """What the model gets of a batch: it does not know a mask of another name than its own."""
    if token_mask in ("attention_mask", None):
        return batch
    return {key: value for key, value in batch.items() if key != token_mask}


def _mask(entry: Mapping[str, Any], key: str) -> Tensor | None:
    """Which tokens a mask of the batch counts; an error where it does not tell."""
    mask = entry.get(key)
    if mask is None:
        if key in ("attention_mask", "decoder_attention_mask"):
            return None
        raise ValueError(
            f"token_mask={key!r} is not in the batch, which has {', '.join(map(str, entry))}; "
            "expected the name of a mask (samples, tokens)"
        )
    ids = ids_shape(entry)
    additive = isinstance(mask, Tensor) and mask.is_floating_point() and bool((mask < 0).any())
    if not isinstance(mask, Tensor) or additive or (mask.dim() != 2 and mask.shape != ids):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{key} is {'additive, ' if additive else ''}{what}, from which padding cannot be "
            "told; expected 1 for the tokens that count and 0 for padding, (samples, tokens), or "
            "FiletConfig(token_mask=...), the name of such a mask in the batch or None if all count"
        )
    return mask != 0


def some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@contextlib.contextmanager
def preserved(
    peft_model: PeftModel, adapter_name: str, targets: Mapping[str, Target]
) -> Iterator[None]:
    """Everything of the model and the process that a pass changes, put back also on an exception.

    Inside: the model as its training will begin (:func:`_as_it_starts`), all parameters frozen,
    dropout off, no key/value cache, gradients on, on CUDA deterministic algorithms, and norms and
    gates by fused kernels. Restored: training flags, requires_grad, which adapters are active, the
    caches' settings, the random states of Python, NumPy and torch. ``.grad`` is never touched:
    nothing that owns one asks for a gradient.
    """
    training = {module: module.training for module in peft_model.modules()}
    requires_grad = {p: p.requires_grad for p in peft_model.parameters()}
    base_model = peft_model.base_model.model
    model_config: Any = getattr(base_model, "config", None)
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    use_cache = getattr(model_config, "use_cache", None)
    dropouts: list[tuple[nn.Module, str, float]] = []
    random_states = (random.getstate(), np.random.get_state())
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    flash = os.environ.get(_FLASH_ATTENTION)
    memory: Any = torch.utils.deterministic  # its attribute is a property that mypy does not see
    fill = memory.fill_uninitialized_memory
    hooks = []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # The switch of _deterministic_attention is the process's, and autograd has a thread of
            # its own for each GPU: one would throw it while another computes.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*CuBLAS.*deterministic")
            stack.enter_context(_as_it_starts(peft_model, adapter_name, targets))
            # cuDNN's attention differs from run to run, also where torch is told to be strict.
            torch.backends.cuda.enable_cudnn_sdp(False)
            os.environ[_FLASH_ATTENTION] = "1"
            if cuda and deterministic != (True, False):
                torch.use_deterministic_algorithms(True, warn_only=True)
                stack.enter_context(_deterministic_attention())
            memory.fill_uninitialized_memory = False  # a pass over every new tensor
            for parameter in requires_grad:
                parameter.requires_grad_(False)
            for module in training:
                # Gradient checkpointing runs only in training mode, so the modules that do it keep
                # that flag; their children lose it, and with it their dropout.
                # (Not getattr: PEFT 0.18's wrapper of a head that is not active fails at any.)
                module.training = training[module] and bool(
                    vars(module).get("gradient_checkpointing", False)
                )
                if module.training:
                    for name, value in list(vars(module).items()):
                        if "drop" in name and isinstance(value, float):
                            dropouts.append((module, name, value))
                            setattr(module, name, 0.0)
            if use_cache is not None:
                model_config.use_cache = False
            stack.enter_context(fused(base_model))
            embeddings = _input_embeddings(base_model)
            if embeddings is not None:
                # Reentrant checkpointing needs an input with gradient at its first block.
                hooks.append(embeddings.register_forward_hook(_ask_for_gradient))
            yield
    finally:
        for hook in hooks:
            hook.remove()
        if use_cache is not None:
            model_config.use_cache = use_cache
        for module, name, value in dropouts:
            setattr(module, name, value)
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        if flash is None:
            os.environ.pop(_FLASH_ATTENTION, None)
        else:
            os.environ[_FLASH_ATTENTION] = flash
        memory.fill_uninitialized_memory = fill
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        if cuda:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


@contextlib.contextmanager
def _as_it_starts(
    peft_model: PeftModel, adapter_name: str, targets: Mapping[str, Target]
) -> Iterator[None]:
    """The model as the adapter's training begins: itself, without what its targets add.

    What else is active then is active here: trained heads and tokens (``modules_to_save``,
    ``trainable_token_indices``), layers of the adapter that FILet does not initialise, and other
    adapters that are active beside it. An adapter that is not active is taken to be alone.
    """
    tuner = peft_model.base_model
    switches = {
        module: (module._active_adapter, module._disable_adapters)
        for module in peft_model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    active = tuner.active_adapter
    try:
        if adapter_name not in tuner.active_adapters:
            tuner.set_adapter(adapter_name)
        off = {(id(target.layer), adapter_name) for target in targets.values()}
        off |= _adding_nothing(switches)
        for module in switches:
            module._disable_adapters = False
            if isinstance(module, LoraLayer):
                names = [name for name in module.active_adapters if (id(module), name) not in off]
                module._active_adapter = names
        yield
    finally:
        for module, (names, disabled) in switches.items():
            module._active_adapter, module._disable_adapters = names, disabled
        tuner.active_adapter = active


def _adding_nothing(modules: Iterable[nn.Module]) -> set[tuple[int, str]]:
    """Layers (by id) and their adapters whose B A is still zero: running them would only cost.

    That of fused experts is a copy of all their weights, kept for the backward.
    """
    nothing: set[tuple[int, str]] = set()
    flags: dict[tuple[int, str], Tensor] = {}
    for layer in modules:
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            linears = [side[name] for side in (layer.lora_A, layer.lora_B) if name in side]
            embeddings = (layer.lora_embedding_A, layer.lora_embedding_B)
            factors = [x.weight for x in linears] + [x[name] for x in embeddings if name in x]
            if not factors or name in layer.lora_variant:  # a variant may scale W
                continue
            if any(factor.device.type == "meta" for factor in factors):
                nothing.add((id(layer), name))
                continue
            zero = torch.stack([~factor.any() for factor in factors]).any()
            biases = [x.bias.any() for x in linears if x.bias is not None]
            flags[id(layer), name] = zero & ~torch.stack(biases).any() if biases else zero
    zeros = values(list(flags.values()))
    return nothing | {place for place, zero in zip(flags, zeros, strict=True) if zero}


@contextlib.contextmanager
def _deterministic_attention() -> Iterator[None]:
    """Makes the backward of scaled_dot_product_attention deterministic, of calls by this thread.

    It adds with atomics, and differs from run to run, unless torch is told to be strict: a mere
    warning leaves it as it is. Being strict about everything would refuse the operations that have
    no other way, so this is for the attention's own node of the graph, which runs in this thread as
    all of the backward does (:func:`preserved`).
    """
    plain, mine = F.scaled_dot_product_attention, threading.get_ident()

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        output = plain(*args, **kwargs)
        node = output.grad_fn if threading.get_ident() == mine else None
        while node is not None and not node.name().startswith("ScaledDotProduct"):
            node = node.next_functions[0][0] if node.next_functions else None
        if node is not None:
            node.register_prehook(lambda *_: torch.use_deterministic_algorithms(True))
            node.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True))
        return output

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


class _Start(torch.autograd.Function):
    """The same memory, as something that has a gradient, of which nothing is kept.

    A leaf that asks for one would keep it, and cannot be written to in place, as BLIP, GIT and CTRL
    do with their embeddings.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


@torch.compiler.disable
def _ask_for_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output.is_floating_point() and output.is_leaf:
        return _Start.apply(output, output.new_empty(0, requires_grad=True))
    return None
