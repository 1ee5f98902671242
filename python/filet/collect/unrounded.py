"""y = W x and h = Wᵀ g before they are rounded to the model's dtype, and their moments.

They enter their moments as float16, each column scaled by a power of two. Rows beyond float16 by
that scale are left out, and added by a smaller one in a second run of their batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from filet.collect.check import OnHost
from filet.collect.rows import Rows
from filet.model.targets import Target
from filet_kernels import SecondMoment, syrk_
from filet_kernels.product import exact_float32, power_of_two
from filet_kernels.rounded import rounded_and_scaled

__all__ = [
    "HANDS_ON",
    "HandsOn",
    "Unrounded",
    "UnroundedLinear",
    "bias_of",
    "bytes_a_row",
    "hands_on",
    "unrounded",
]

# Where a linear layer in bfloat16 or float16 hands y and h on before it rounds them.
HANDS_ON = {"cuda"}

# They enter their moments as float16, each column scaled by a power of two that puts the largest
# number of the first batch at 2 to 4. That leaves 2¹⁴ of room, and 11 bits to what is 2⁻¹⁶ of it.
# Rows beyond that room are left out, and added by a smaller scale in a second run of their batch.
_PEAK = 2.0

# Of a column that was zero in the first batch: so whatever comes is beyond, and sets the scale.
_UNKNOWN_SCALE = 2.0**100


def hands_on(device: torch.device) -> bool:
    """Whether linear layers there hand y and h on before they round them."""
    return device.type in HANDS_ON


def bytes_a_row(shape: tuple[int, int]) -> int:
    """Bytes of a row of y or h of a layer (m, n): float32, then |y| or scaled float16 beside."""
    m, n = shape
    return 8 * min(m, n) if m != n else 0


@dataclass(frozen=True, eq=False)
class _Run:
    """A batch that went through: whether moments lack rows of it, and how it goes through again."""

    left_out: dict[int, list[Tensor]]  # of each moment (by id), call by call: the rows
    flags: list[OnHost]  # of each device; by slots
    again: Callable[[], object]


class Unrounded:
    """Adds rows of y and h to their moments, scaled; later also those that were left out.

    Attributes:
        runs: the batches that went through and whose left-out rows have not been looked at.
        most: the largest of a number in all processes that run the model together.
    """

    def __init__(self, rows: Rows, slots: int) -> None:
        """``slots``: moments that there may be on a device."""
        self.runs: list[_Run] = []
        self.most: Callable[[int], int] = int
        self._rows = rows
        self._slots_a_device = slots
        self._scales: dict[int, tuple[SecondMoment, Tensor]] = {}  # of the columns of y and h
        self._slots: dict[int, int] = {}  # of those moments, in the flags of a device
        self._flags: dict[torch.device, Tensor] = {}  # of this batch: a moment lacks rows of it
        self._left_out: dict[int, list[Tensor]] = {}
        self._missing: dict[int, list[Tensor]] | None = None  # in a second run: what to add
        self._again: Callable[[], object] | None = None  # the last batch

    def start_batch(self) -> None:
        self._flags, self._left_out = {}, {}

    def add(
        self,
        name: str,
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
            self._add_beyond(name, moment, v, self._missing[key].pop(0), alpha)
        if not enters or not self._rows.counting:
            return (v if bias is None else v + bias).to(dtype)
        if v.numel() and key not in self._scales:
            weights = self._rows.of(name, v)[1]
            largest = _largest(v, weights)
            # Where these rows say nothing of a column, what they say of the others.
            largest = torch.where(largest > 0, largest, largest.amax())
            self._scales[key] = moment, _scale_for(largest)
        scale = self._scales[key][1] if v.numel() else v.new_ones(v.shape[-1])
        rounded, scaled, left_out = rounded_and_scaled(
            v, scale, bias=bias, dtype=dtype, flag=self._flag(moment, v.device)
        )
        self._left_out.setdefault(key, []).append(left_out)
        self._rows.add(name, moment, scaled, alpha=alpha)
        return rounded

    def note_run(self, again: Callable[[], object]) -> None:
        """Keep, of the batch that just went through, which rows its moments lack."""
        self._again = again
        if self._left_out:
            flags = [OnHost.of(flags) for flags in self._flags.values()]
            self.runs.append(_Run(self._left_out, flags, again))

    def add_left_out(self, runs: int | None = None) -> None:
        """Add the rows that were left out of the first ``runs`` runs noted, of all by default.

        Those were beyond float16 by the scale of their moments. Their batch goes through again, for
        them alone, the moments and they scaled down by powers of two, which changes no bit.
        """
        settled, self.runs = self.runs[:runs], self.runs[len(self.runs[:runs]) :]
        behind = [(run.again, missing) for run in settled if (missing := self._missing_of(run))]
        counting = self._rows.counting
        for number in range(self.most(len(behind))):
            # Whoever lacks nothing takes part in the runs of the others.
            mine = number < len(behind)
            again = behind[number][0] if mine else self._again
            assert again is not None
            self._rows.counting, self._missing = False, behind[number][1] if mine else None
            again()
            self._rows.counting, self._missing = counting, None

    def _missing_of(self, run: _Run) -> dict[int, list[Tensor]]:
        """The rows of a batch that each moment lacks (by id), call by call."""
        flagged: set[int] = set()
        for flags in run.flags:
            flagged.update(flags.arrived().nonzero().flatten().tolist())
        return {k: rows for k, rows in run.left_out.items() if self._slots[k] in flagged}

    def finish(self) -> None:
        """Take the scales back out of the moments."""
        for moment, scale in self._scales.values():
            moment.sum.div_(scale).div_(scale.unsqueeze(1))
        self._scales.clear()
        self._again = None

    def _flag(self, moment: SecondMoment, device: torch.device) -> Tensor:
        """Where it is noted that this moment lacks a row of the batch."""
        if device not in self._flags:
            slots = self._slots_a_device
            self._flags[device] = torch.zeros(slots, dtype=torch.int32, device=device)
        return self._flags[device][self._slots.setdefault(id(moment), len(self._slots))]

    def _add_beyond(
        self, name: str, moment: SecondMoment, v: Tensor, left_out: Tensor, alpha: float
    ) -> None:
        """Adds the rows of v that were left out, all by the scale that they need."""
        rows, weights = self._rows.of(name, v)
        left_out = left_out.view(rows.shape[:-1])
        weights = left_out if weights is None else left_out & weights
        before = self._scales[id(moment)][1]
        scale = torch.minimum(before, _scale_for(_largest(rows, weights)))
        moment.sum.mul_(scale / before).mul_((scale / before).unsqueeze(1))
        self._scales[id(moment)] = moment, scale
        syrk_(moment.sum, (rows * scale).half(), alpha=alpha, weights=weights)


def bias_of(target: Target, dtype: torch.dtype) -> Tensor | None:
    """A layer's bias in the dtype that the layer adds it in; bitsandbytes casts it there."""
    bias: Any = target.base.bias
    return None if bias is None else bias.detach().to(dtype)


class HandsOn(Protocol):
    """To whom a layer hands y and h on; who returns them rounded, or None for neither."""

    def take_y(self, target: Target, x: Tensor) -> Tensor | None: ...

    def take_h(self, target: Target, gradient: Tensor) -> Tensor | None: ...


class UnroundedLinear(torch.autograd.Function):
    """y = x Wᵀ + b and h = g W of a frozen layer, both handed on before they are rounded.

    The matrix unit has them in float32 anyway. Rounded to the model's bfloat16 first, they would
    change choices (docs/accuracy.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, hooks: HandsOn, target: Target) -> Tensor:
        ctx.hooks, ctx.target = hooks, target
        y = hooks.take_y(target, x)
        return F.linear(x, target.weight_for(x.dtype), bias_of(target, x.dtype)) if y is None else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h = ctx.hooks.take_h(ctx.target, gradient)
        if h is None:
            h = gradient @ ctx.target.weight_for(gradient.dtype)
        return h, None, None


@torch.no_grad()
def unrounded(v: Tensor, M: Tensor, dtype: torch.dtype) -> Tensor:
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


def _largest(v: Tensor, weights: Tensor | None) -> Tensor:
    """Of the rows that count, the largest number of each column."""
    rows = v.abs()
    if weights is not None:
        rows = torch.where(weights.view(*rows.shape[:-1], 1), rows, 0)
    return rows.flatten(0, -2).amax(0)


def _scale_for(largest: Tensor) -> Tensor:
    power = power_of_two(largest)
    return torch.where(power > 0, _PEAK / power, _UNKNOWN_SCALE)
