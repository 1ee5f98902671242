"""The pass over the data: forward, backward, and the second moments taken on the way.

x is there in a module's forward and g in its backward: each moment is accumulated where its
vector exists anyway, and nothing is kept. y = Wx and h = Wᵀg are needed before they are rounded: on
a GPU the module's own products give them (:class:`_Linear`), elsewhere they are formed once more.
Weights stay frozen, so no weight gradient is ever computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filet.config import FiletConfig
from filet.model.overrides import Forwards
from filet.model.targets import Target
from filet_kernels import Moments, SecondMoment, syrk_
from filet_kernels.product import exact_float32, power_of_two
from filet_kernels.rounded import rounded_and_scaled

__all__ = [
    "HANDS_ON",
    "MomentHooks",
    "bound",
    "crosses",
    "empty_moments",
    "hands_on",
    "is_key_or_value",
]

# Where a linear layer in bfloat16 or float16 hands y and h on before it rounds them.
HANDS_ON = {"cuda"}


def hands_on(device: torch.device) -> bool:
    """Whether linear layers there hand y and h on before they round them."""
    return device.type in HANDS_ON


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
                self._forwards.replace(module, bound(self._forward, target))
            self._handles.append(target.base.register_forward_pre_hook(bound(self._before, target)))
            self._handles.append(target.base.register_forward_hook(bound(self._after, target)))
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
            output.register_hook(bound(self._gradient, target, self._hands_on(target, args[0])))

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
            and hands_on(weight.device)  # where a device map brings x, if it is elsewhere
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
        if crosses(parts):
            return "encoder" if is_key_or_value(parts) else "decoder"
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


def crosses(parts: list[str]) -> bool:
    """Whether a module's path is one of cross-attention."""
    return any(word in part for part in parts for word in ("EncDec", "encoder_attn", "cross"))


def is_key_or_value(parts: list[str]) -> bool:
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


def bound(method: Callable[..., Any], *first: Any) -> Callable[..., Any]:
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
