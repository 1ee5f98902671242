"""Where an adapter of one linear layer starts, whatever chose it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Start", "scaled"]


@dataclass(frozen=True, eq=False)
class Start:
    """An adapter of one linear layer at its start: y = W x + (B A − B0 A0) x.

    The scaling is one: α = r. A and B train; A0 and B0 never change. An initialisation that writes
    W_res = W − B A into the model has A0 = A and B0 = B here, so that W stays every member's.

    Attributes:
        A, B: (r, n) and (m, r), float32.
        A0, B0: (r0, n) and (m, r0), float32, or None where nothing is subtracted.
    """

    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None


def scaled(start: Start, factor: float) -> Start:
    """A and B each times ``factor``; what is subtracted goes with them."""
    A0 = None if start.A0 is None else start.A0 * factor
    B0 = None if start.B0 is None else start.B0 * factor
    return Start(start.A * factor, start.B * factor, A0, B0)
