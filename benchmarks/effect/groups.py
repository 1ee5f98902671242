"""Groups of W's singular directions, one of which trains: the frames of the paper's Figure 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from effect.context import Context
from effect.published import fisher_scores, subtracted
from effect.start import Start

__all__ = ["Group", "singular_groups"]


@dataclass(frozen=True, eq=False)
class Group:
    """One group of every layer.

    Attributes:
        starts: by layer; the rank is the group's size, min(m, n) // groups.
        keys: by layer, the mean over the group of what the directions were sorted by.
    """

    starts: dict[str, Start]
    keys: dict[str, float]

    @property
    def key(self) -> float:
        """The mean over the layers."""
        return sum(self.keys.values()) / len(self.keys)


def singular_groups(
    context: Context, key: Literal["sigma", "energy"], groups: int = 32, c: float = 1 / 3
) -> list[Group]:
    """W's singular directions, sorted by ``key`` from the largest, cut into ``groups``.

    W = U Σ Vᵀ; of a group I, A = √c V_Iᵀ and B = U_I √c, subtracted. "sigma" is σ_i, "energy" is
    (v_iᵀ S_X v_i)(u_iᵀ S_Y u_i) of the summed loss. Where min(m, n) is no multiple of ``groups``,
    a direction is left out between some of them, so that all groups of a layer are of one size.
    """
    if key not in ("sigma", "energy"):
        raise ValueError(f"key={key!r}; expected 'sigma' or 'energy'")
    starts: list[dict[str, Start]] = [{} for _ in range(groups)]
    keys: list[dict[str, float]] = [{} for _ in range(groups)]
    for name, (U, sigma, Vh) in context.singular.items():
        count = len(sigma)
        if count < groups:
            raise ValueError(f"{name} has {count} singular directions; expected at least {groups}")
        values = sigma if key == "sigma" else fisher_scores((U, sigma, Vh), context.moments[name])
        order = torch.argsort(values, descending=True, stable=True)
        for i in range(groups):
            first = i * count // groups
            chosen = order[first : first + count // groups]
            starts[i][name] = subtracted(c**0.5 * Vh[chosen], U[:, chosen] * c**0.5)
            keys[i][name] = float(values[chosen].mean())
    return [Group(starts[i], keys[i]) for i in range(groups)]
