"""Groups of W's singular directions, one of which trains: the frames of the paper's Figure 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from effect.context import Context
from effect.published import fisher_scores, subtracted
from effect.start import Start

__all__ = ["GROUPS", "KEYS", "SCALES", "Group", "group_start", "singular_groups"]

GROUPS = 32
KEYS = ("sigma", "energy")
SCALES = ("min", "max")


Key = Literal["sigma", "energy"]
Scale = Literal["min", "max"]


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


def singular_groups(context: Context, key: Key, scale: Scale, groups: int = GROUPS) -> list[Group]:
    """W's singular directions, sorted by ``key`` from the largest, cut into ``groups``.

    W = U Σ Vᵀ; of a group I, A = √c V_Iᵀ and B = U_I √c, subtracted. "sigma" is σ_i, "energy" is
    (v_iᵀ S_X v_i)(u_iᵀ S_Y u_i) of the summed loss. Where min(m, n) is no multiple of ``groups``,
    a direction is left out between some of them, so that all groups of a layer are of one size.

    c is the same for all groups of a layer, so that they differ in directions alone: the mean over
    the group of the smallest σ for "min", of the largest for "max". How the paper's figure sets it
    was not at hand; a single smallest σ can be 0, where neither factor would have a gradient.
    """
    if key not in KEYS:
        raise ValueError(f"key={key!r}; expected 'sigma' or 'energy'")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}; expected 'min' or 'max'")
    starts: list[dict[str, Start]] = [{} for _ in range(groups)]
    keys: list[dict[str, float]] = [{} for _ in range(groups)]
    for name, (U, sigma, Vh) in context.singular.items():
        count = len(sigma)
        if count < groups:
            raise ValueError(f"{name} has {count} singular directions; expected at least {groups}")
        values = sigma if key == "sigma" else fisher_scores((U, sigma, Vh), context.moments[name])
        size = count // groups
        c = float((sigma[-size:] if scale == "min" else sigma[:size]).mean())
        order = torch.argsort(values, descending=True, stable=True)
        for i in range(groups):
            first = i * count // groups
            chosen = order[first : first + size]
            starts[i][name] = subtracted(c**0.5 * Vh[chosen], U[:, chosen] * c**0.5)
            keys[i][name] = float(values[chosen].mean())
    return [Group(starts[i], keys[i]) for i in range(groups)]


def group_start(context: Context, key: Key, scale: Scale, number: int) -> dict[str, Start]:
    """Where one of the :data:`GROUPS` starts, number 0 having the largest keys."""
    groups = context.once(("groups", key, scale), lambda: singular_groups(context, key, scale))
    return groups[number].starts
