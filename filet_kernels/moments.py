"""Accumulators of a layer's second moments: which space, which dtype, merge, save, load.

A layer y = Wx + b with output gradient g needs one moment of its input side and one of its output
side. Each has two equivalent forms (see :mod:`filet_kernels.energy`), one of size n and one of size
m, and the smaller is taken:
    input  side: "x" (n), S_X = E[x xᵀ]   or "y" (m), C_y = E[(Wx)(Wx)ᵀ]
    output side: "g" (m), S_Y = E[g gᵀ]   or "h" (n), C_h = E[(Wᵀg)(Wᵀg)ᵀ]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from filet_kernels.syrk import syrk_

__all__ = ["Moments", "SecondMoment", "Space"]

Space = Literal["x", "y", "g", "h"]


@dataclass(eq=False)
class SecondMoment:
    """The running sum Σ_t w_t v_t v_tᵀ of one vector of a layer, and how many tokens it counts.

    Attributes:
        space: which vector v is: the input "x", the output less bias "y", the output's gradient
            "g" or the input's gradient "h".
        sum: (d, d) float32 or float64; the lower triangle holds the sum, the rest is undefined.
        count: () int64, tokens counted, on the device of ``sum`` (no synchronisation to count).
    """

    space: Space
    sum: Tensor
    count: Tensor

    @classmethod
    def zeros(
        cls,
        space: Space,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SecondMoment:
        """An empty accumulator of shape (size, size)."""
        if space not in ("x", "y", "g", "h"):
            raise ValueError(f"space={space!r}; expected 'x', 'y', 'g' or 'h'")
        return cls(
            space,
            torch.zeros(size, size, dtype=dtype, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def update(self, X: Tensor, *, weights: Tensor | None = None, alpha: float = 1.0) -> None:
        """Add a batch of rows: sum += alpha Xᵀ diag(w) X and count += #{w ≠ 0}.

        X (T, d) or (B, T, d) and weights as in :func:`filet_kernels.syrk_`; mutates this object.
        """
        syrk_(self.sum, X, alpha=alpha, weights=weights)
        if weights is None:
            self.count += X.shape[:-1].numel()
        else:
            self.count += (weights != 0).sum()

    def merged(self, other: SecondMoment) -> SecondMoment:
        """The moment over both data sets, as a new object on this one's device."""
        if self.space != other.space or self.sum.shape != other.sum.shape:
            raise ValueError(
                f"cannot merge a moment in space {other.space!r} of size {other.sum.shape[0]} "
                f"into one in space {self.space!r} of size {self.sum.shape[0]}"
            )
        return SecondMoment(
            self.space,
            self.sum + other.sum.to(self.sum.device),
            self.count + other.count.to(self.count.device),
        )


@dataclass(eq=False)
class Moments:
    """Both second moments of a layer y = Wx, W (m, n), and the number of loss terms behind g.

    Sums over counted tokens of the gradient of the *summed* loss: however the samples were
    batched, the sums are the same to rounding, and two sets add up (:meth:`merged`).

    Attributes:
        input: the moment of the input side, in space "x" or "y". May be shared between layers
            that take the same input.
        output: the moment of the output side, in space "g" or "h".
        shape: (m, n) of W.
        loss_terms: () int64, the loss terms (labelled tokens, say) that the summed loss adds up.
    """

    input: SecondMoment
    output: SecondMoment
    shape: tuple[int, int]
    loss_terms: Tensor

    def __post_init__(self) -> None:
        m, n = self.shape
        for side, spaces in (("input", {"x": n, "y": m}), ("output", {"g": m, "h": n})):
            moment = getattr(self, side)
            if moment.space not in spaces:
                raise ValueError(
                    f"{side} is in space {moment.space!r}; expected one of {sorted(spaces)}"
                )
            size = spaces[moment.space]
            if moment.sum.shape != (size, size):
                raise ValueError(
                    f"{side} has shape {tuple(moment.sum.shape)} in space {moment.space!r}; "
                    f"expected ({size}, {size}) for W of shape ({m}, {n})"
                )

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        input: SecondMoment | None = None,
    ) -> Moments:
        """Empty moments of a layer with W of shape (m, n), each side in its smaller space.

        Where m = n the direct vectors are taken (x and g), which are not rounded once more.
        ``input`` shares the moment of a layer that takes the same input instead.
        """
        m, n = shape
        if input is None:
            input = SecondMoment.zeros(
                "x" if n <= m else "y", min(m, n), dtype=dtype, device=device
            )
        output = SecondMoment.zeros("g" if m <= n else "h", min(m, n), dtype=dtype, device=device)
        return cls(input, output, (m, n), torch.zeros((), dtype=torch.int64, device=device))

    def update(
        self,
        *,
        x: Tensor | None = None,
        y: Tensor | None = None,
        g: Tensor | None = None,
        h: Tensor | None = None,
        weights: Tensor | None = None,
        alpha: float = 1.0,
        loss_terms: int = 0,
    ) -> None:
        """Add a batch of tokens to whichever sides are given, in the spaces these moments use.

        Args:
            x, y, g, h: (T, d) or (B, T, d); the input, the output *less bias*, and the gradients of
                the summed loss with respect to the output and to the input. One that this layer's
                moments do not use is refused.
            weights: (T,) or (B, T), 0 for rows that do not count (padding).
            alpha: factor of the products; 1 / scale² where g or h carry a loss scale.
            loss_terms: how many terms the summed loss of this batch has.
        """
        used = {self.input.space: self.input, self.output.space: self.output}
        for space, rows in (("x", x), ("y", y), ("g", g), ("h", h)):
            if rows is None:
                continue
            if space not in used:
                raise ValueError(f"{space} was given, but these moments use {sorted(used)}")
            used[space].update(rows, weights=weights, alpha=alpha)
        self.loss_terms += loss_terms

    def merged(self, other: Moments) -> Moments:
        """The moments over both data sets: equal, to rounding, to one run over all of it."""
        if self.shape != other.shape:
            raise ValueError(f"cannot merge moments of shape {other.shape} into {self.shape}")
        return Moments(
            self.input.merged(other.input),
            self.output.merged(other.output),
            self.shape,
            self.loss_terms + other.loss_terms.to(self.loss_terms.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings, for ``torch.save`` or safetensors; nothing is copied."""
        return {
            "shape": self.shape,
            "loss_terms": self.loss_terms,
            **{
                f"{side}.{field}": getattr(getattr(self, side), field)
                for side in ("input", "output")
                for field in ("space", "sum", "count")
            },
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Moments:
        """The moments that :meth:`state_dict` describes; its tensors are used, not copied."""
        input, output = (
            SecondMoment(*(state[f"{side}.{field}"] for field in ("space", "sum", "count")))
            for side in ("input", "output")
        )
        m, n = state["shape"]
        return cls(input, output, (m, n), state["loss_terms"])
