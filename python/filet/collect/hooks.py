"""Hooks on the target modules, by which their second moments are taken on the way.

x is there in a module's forward and g in its backward: each moment is accumulated where its
vector exists anyway, and nothing is kept. y = Wx and h = Wᵀg are needed before they are rounded: on
a GPU the module's own products give them (:mod:`filet.collect.unrounded`), elsewhere they are
formed once more. Weights stay frozen, so no weight gradient is ever computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from filet.collect.check import FiniteCheck
from filet.collect.rows import Rows
from filet.collect.sharing import SharedInputs, sharing_broke
from filet.collect.unrounded import Unrounded, UnroundedLinear, bias_of, hands_on, unrounded
from filet.config import FiletConfig
from filet.model.overrides import replaced
from filet.model.targets import Target
from filet_kernels import Moments, SecondMoment

__all__ = ["MomentHooks", "bound", "empty_moments"]


class MomentHooks:
    """Hooks on the base modules of the targets that accumulate each one's :class:`Moments`.

    The input side is counted while ``phase`` is "forward", which is once also under gradient
    checkpointing, whose recomputation runs in the backward. The output side is counted when the
    gradient arrives, which is once as well: of the two forward runs only one is differentiated.

    Only the model that is to be trained is counted. A loss that compares it with a reference, the
    same model with its adapters switched off or another one on (DPO), runs that as well.

    Attributes:
        moments: module → what was accumulated.
        shared_input: module → the module whose input moment it uses.
        unmasked: modules whose rows the attention mask could not be put to, and how many of a
            sample.
        phase: "idle", "forward", "backward" or "probe".
        gradient_scale: what g and h of this batch are multiplied by.
        half: a target gave float16, and so will its gradient be.
        peaks: of a probe, max |g| of each gradient that arrived.
    """

    def __init__(
        self,
        targets: dict[str, Target],
        config: FiletConfig,
        counted: Collection[str] | None = None,
    ) -> None:
        """``counted``: the targets whose moments are taken, all by default.

        The others are watched only by the probe: the loss scale is that of the whole model.
        """
        self.targets = targets
        self.config = config
        # In an order that is every process's: a set of names has one of its own in each.
        wanted = targets if counted is None else counted
        self.counted = dict.fromkeys(name for name in targets if name in wanted)
        self.rows = Rows({name for name, target in targets.items() if target.beside})
        self.unrounded = Unrounded(self.rows, 2 * len(targets))
        self.sharing = SharedInputs()
        self.moments: dict[str, Moments] = {}
        self.shared_input = self.sharing.of
        self.unmasked = self.rows.unmasked
        self.phase = "idle"
        self.gradient_scale = 1.0
        self.half = False
        self.peaks: list[Tensor] = []
        self._calls: dict[str, int] = {}
        self._trained = {name: _switches(target) for name, target in targets.items()}
        self._check = FiniteCheck()
        self._replaced: set[nn.Module] = set()  # whose forwards are ours
        self._stack = contextlib.ExitStack()

    @property
    def counting(self) -> bool:
        """False: the products of a forward that counts, but no moment of them."""
        return self.rows.counting

    @counting.setter
    def counting(self, counting: bool) -> None:
        self.rows.counting = counting

    def follow(self, moments: Mapping[str, Moments], shared_input: Mapping[str, str]) -> None:
        """Count inputs alone, in new moments of the spaces, and shared as, in these of other data.

        ``moments``: of every counted module.
        """
        new: dict[int, SecondMoment] = {}
        for name in self.counted:
            its = moments[name].input
            if id(its) not in new:
                leader = self.targets[shared_input.get(name, name)]
                new[id(its)] = SecondMoment.zeros(
                    its.space, its.sum.shape[0], dtype=its.sum.dtype, device=leader.device
                )
            self.moments[name] = Moments.zeros(
                moments[name].shape, device="meta", input=new[id(its)]
            )
            if name in shared_input:
                self.shared_input[name] = shared_input[name]

    def __enter__(self) -> MomentHooks:
        with contextlib.ExitStack() as stack:
            forwards: dict[nn.Module, Callable[..., Any]] = {
                target.base: bound(self._forward, target)
                for target in self.targets.values()
                if target.values.multiplies
            }
            self._replaced = stack.enter_context(replaced(forwards))
            for target in self.targets.values():
                base = target.base
                before = base.register_forward_pre_hook(bound(self._before, target))
                after = base.register_forward_hook(bound(self._after, target))
                stack.callback(after.remove)
                stack.callback(before.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self.sharing.clear()

    def finish(self) -> None:
        """Take the scales of y and h back out of their moments, and write the counts into them."""
        assert not self.unrounded.runs  # what they lack is added while the hooks are there
        self._check.judge()
        self.unrounded.finish()
        self.rows.finish()

    def leave_uncounted(self) -> None:
        """Forget the modules of which nothing was counted, only run."""
        for name in [n for n, its in self.moments.items() if its.output.sum.is_meta]:
            del self.moments[name]

    def start_batch(self, masks: dict[str, Tensor | None]) -> None:
        """``masks`` (B, T) of the tokens to count: "encoder" and "decoder"; None counts all."""
        self.rows.start_batch(masks)
        self.sharing.clear()
        self._calls.clear()
        self.unrounded.start_batch()

    def finish_batch(self, index: int, again: Callable[[], object]) -> None:
        """Look for what is wrong with this batch, and mend or raise it, on a GPU one batch later.

        By then the answer has arrived, so that the GPU need not run dry for it. ``again`` runs this
        batch forward and backward once more.
        """
        self.check_sharing(index)
        earlier = len(self.unrounded.runs)
        self.note_run(again)
        self._check.judge()
        self.add_left_out(earlier)
        self._check.begin(self.moments, f"batch {index} (counted from 0)")
        if not self._check.waits:
            self._check.judge()

    def note_run(self, again: Callable[[], object]) -> None:
        """See :meth:`Unrounded.note_run`."""
        self.unrounded.note_run(again)

    def add_left_out(self, runs: int | None = None) -> None:
        """See :meth:`Unrounded.add_left_out`."""
        self.unrounded.add_left_out(runs)

    def check_sharing(self, index: int) -> None:
        """Raise where modules that shared an input did not in this batch. No synchronisation."""
        for follower, leader in self.shared_input.items():
            if self._calls.get(follower, 0) != self._calls.get(leader, 0):
                raise sharing_broke(follower, leader, index)
        self.sharing.clear()

    def check_finite(self, where: str) -> None:
        """Raise for a NaN or infinity in any moment. One device synchronisation a device."""
        self._check.begin(self.moments, where)
        self._check.judge()

    def take_y(self, target: Target, x: Tensor) -> Tensor | None:
        """The layer's output, after x Wᵀ entered its moment; None where that is not of y.

        Also where it does not enter: the forward that gradient checkpointing runs once more has to
        take the same product, or the gradients are of other activations (25 of 204,800 elements of
        a layer's output differed).
        """
        moment = self.moments[target.name].input
        if moment.space != "y":
            return None
        y = unrounded(x, target.weight_for(x.dtype).T, torch.float32)
        enters, bias = self.phase == "forward", bias_of(target, x.dtype)
        return self.unrounded.add(target.name, moment, y, x.dtype, enters, bias=bias)

    def take_h(self, target: Target, gradient: Tensor) -> Tensor | None:
        """The input's gradient g W, after it entered its moment; None as for :meth:`take_y`."""
        moment = self.moments[target.name].output
        if moment.space != "h":
            return None
        h = unrounded(gradient, target.weight_for(gradient.dtype), torch.float32)
        enters, alpha = self.phase == "backward", self.gradient_scale**-2
        return self.unrounded.add(target.name, moment, h, gradient.dtype, enters, alpha=alpha)

    # The hooks.

    def _before(self, target: Target, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{target.name} was called with {type(args[0]).__name__ if args else 'no'} "
                "positional input; expected a tensor, or target_modules without it"
            )
        if self._of_reference(target):
            return None
        x = args[0]
        why_not = None if target.values.casts else target.values.why_untrainable(x)
        if why_not is not None:
            raise ValueError(f"{target.name}: {why_not}")
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
        if self._of_reference(target):
            return
        self.half = self.half or output.dtype == torch.float16
        if output.requires_grad:
            x = args[0]
            output.register_hook(bound(self._gradient, target, x.dtype, self._hands_on(target, x)))

    def _forward(self, target: Target, x: Tensor) -> Tensor:
        """What the layer does, with y and h handed on where a moment is of them."""
        if self._hands_on(target, x):
            y: Tensor = UnroundedLinear.apply(_entering(target, x), self, target)
            return y.to(x.dtype)
        y = type(target.base).forward(target.base, x)
        return y

    def _of_reference(self, target: Target) -> bool:
        """Whether a call is by another model than the one that is to be trained."""
        return _switches(target) != self._trained[target.name]

    def _hands_on(self, target: Target, x: Tensor) -> bool:
        moments, values = self.moments.get(target.name), target.values
        if (
            moments is None
            or (moments.input.space != "y" and moments.output.space != "h")
            or target.base not in self._replaced
            or self._of_reference(target)
            or not hands_on(values.device)  # where a device map brings x, if it is elsewhere
            or torch.is_autocast_enabled(values.device.type)
        ):
            return False
        dtype = values.dtype_for(x.dtype)
        return dtype in (torch.bfloat16, torch.float16) and (x.dtype == dtype or values.rounds)

    def _count_input(self, target: Target, x: Tensor) -> None:
        name = target.name
        self._calls[name] = self._calls.get(name, 0) + 1
        owner = self.sharing.owner(x)
        if name not in self.moments:
            share = None
            if owner is not None and self.config.share_inputs:
                share = self.moments[owner].input
                self.shared_input[name] = owner
            # Where nothing is counted, only the spaces matter.
            self.moments[name] = empty_moments(target, share, None if self.counting else "meta")
        mine, leader = self.moments[name].input, self.shared_input.get(name)
        if leader is not None:
            if owner != leader:
                raise sharing_broke(name, leader, None)
        elif mine.space == "x":
            self.rows.add(name, mine, _entering(target, x.detach()))
            self.sharing.own(x, name)
        elif not self._hands_on(target, x):
            v = _entering(target, x.detach())
            W = target.weight_for(x.dtype)
            self.rows.add(name, mine, unrounded(v, W.T, mine.sum.dtype))

    def _gradient(
        self, target: Target, of_x: torch.dtype, handed_on: bool, gradient: Tensor
    ) -> None:
        """``of_x``: the dtype of the layer's input, in which some go back as well."""
        if self.phase == "probe":
            rows, weights = self.rows.of(target.name, gradient.detach())
            peak = rows.abs().amax(-1)
            if weights is not None:
                peak = torch.where(weights, peak, 0)
            self.peaks.append(peak.max() if peak.numel() else peak.sum())
        elif self.phase == "backward" and target.name in self.counted:
            output = self.moments[target.name].output
            v = _entering(target, gradient.detach())
            if output.space == "h":
                if handed_on:
                    return
                v = unrounded(v, target.weight_for(of_x), output.sum.dtype)
            self.rows.add(target.name, output, v, alpha=self.gradient_scale**-2)


def _switches(target: Target) -> tuple[Any, bool]:
    """Which adapters of a layer are active, and whether all are off."""
    return target.layer._active_adapter, target.layer._disable_adapters


def _entering(target: Target, v: Tensor) -> Tensor:
    """x or g as the layer multiplies it: rounded, where it rounds to its own dtype first."""
    if not target.values.rounds:
        return v
    dtype = target.values.dtype_for(v.dtype)
    return v.to(dtype) if dtype.itemsize <= v.itemsize else v


def empty_moments(
    target: Target,
    shared_input: SecondMoment | None = None,
    device: torch.device | str | None = None,
) -> Moments:
    """Accumulators for a layer, on the weight's device by default."""
    dtype, place = target.sums
    return Moments.zeros(target.shape, dtype=dtype, device=device or place, input=shared_input)


def bound(method: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """``method`` with its first arguments fixed, as a plain function that torch can hook.

    torch.compile leaves it alone: what a hook counts changes with every batch, and compiled anew
    each time it would run into Dynamo's limit (18 s of a pass over one small Llama, then 9.5).
    """
    bound: Callable[..., Any] = torch.compiler.disable(lambda *args: method(*first, *args))
    return bound
