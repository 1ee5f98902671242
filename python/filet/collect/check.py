"""Looking for NaN and infinity in moments without holding up a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from filet_kernels import Moments, SecondMoment

__all__ = ["FiniteCheck", "OnHost"]


@dataclass(frozen=True, eq=False)
class OnHost:
    """Flags on their way to the host."""

    flags: Tensor
    event: torch.cuda.Event | None  # when they are there; None for those that were there already

    @classmethod
    def of(cls, flags: Tensor) -> OnHost:
        if not flags.is_cuda:
            return cls(flags, None)
        host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device(flags.device):
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
        return cls(host, event)

    def arrived(self) -> Tensor:
        """The flags; waits for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.flags


@dataclass(frozen=True)
class _Awaited:
    """The check of a batch, on its way to the host."""

    where: str
    checks: list[tuple[str, SecondMoment]]
    places: list[list[int]]  # in checks, of each kind of moment
    fine: list[OnHost]  # of each kind


class FiniteCheck:
    """The check of the last batch, whose answer is looked at when it has arrived."""

    def __init__(self) -> None:
        self._awaited: _Awaited | None = None

    @property
    def waits(self) -> bool:
        """Whether the answer is not there yet."""
        return self._awaited is not None and any(
            flags.event is not None for flags in self._awaited.fine
        )

    def begin(self, moments: Mapping[str, Moments], where: str) -> None:
        """Ask whether all moments are finite; :meth:`judge` says. No synchronisation."""
        names = list(moments)
        # The first module of the forward, then the first of the backward, is where it began.
        checks = [(name, moments[name].input) for name in names]
        checks += [(name, moments[name].output) for name in reversed(names)]
        checks = [check for check in checks if not check[1].sum.is_meta]  # those that are counted
        alike: dict[tuple[torch.device, int], dict[int, int]] = {}
        for position, (_, moment) in enumerate(checks):
            of_kind = alike.setdefault((moment.sum.device, moment.sum.shape[0]), {})
            of_kind.setdefault(id(moment), position)
        fine = []
        for of_kind in alike.values():
            # A NaN or infinity in any counted row stays on the diagonal, the sum of squares.
            diagonals = torch.stack([checks[p][1].sum.diagonal() for p in of_kind.values()])
            fine.append(OnHost.of(diagonals.isfinite().all(1)))
        places = [list(of_kind.values()) for of_kind in alike.values()]
        self._awaited = _Awaited(where, checks, places, fine)

    def judge(self) -> None:
        """Raise for the last batch whose check has not been looked at."""
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return
        bad: list[int] = []
        for positions, flags in zip(awaited.places, awaited.fine, strict=True):
            fine = flags.arrived().tolist()
            bad += [p for p, is_fine in zip(positions, fine, strict=True) if not is_fine]
        if bad:
            name, moment = awaited.checks[min(bad)]
            where = {"x": "its input", "y": "its output"}.get(
                moment.space, "the gradient it received"
            )
            raise FloatingPointError(
                f"{name}: {where} has a NaN or infinity in {awaited.where}; "
                "expected finite values (check that batch, and the model's dtype)"
            )
