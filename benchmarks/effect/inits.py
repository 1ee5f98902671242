"""Every initialisation by its name.

PEFT's own: lora, gaussian, orthogonal, pissa, olora, eva, corda-kpm, corda-ipm, lora-ga. Published
recipes: milora, farss, cg-lora, lora-da, and whitened.{zero, untouched}. And forms, whose names say
what they are made of:

    filet-{M, R, P}.fisher.{relative, mean, sum}.{zero, untouched}
    filet-{M, R, P}.singular.{relative, mean}.…           it does not depend on the loss
    filet-{M, R, P}.constant.relative.…
    filet-{M, R, P}.{constant_min, constant_max}.{mean, sum}.…
    filet-{M, R, P}-orthogonal.{fisher, singular, constant}.relative.…
    eva-ref, eva-ref.p-0.25                               rows times λ^p
    filet-keep.d{0.1, 0.01}, filet-keep.d0.01.self        the library's keep=, of data or "self"
    {contrast, contrast-row}.d{0.1, 0.01, 0.001}[.p0.25, .p0.5][.untouched]
    filet-keep.d0.01.both                                 and B by the output side, subtracted
    groups.{sigma, energy}.{min, max}.{00 … 31}           a group of singular directions
    {lora, filet-keep.d0.01, filet-M-orthogonal.fisher.relative.zero}.frozen   of which B trains

α = r and the scaling is 1 everywhere; a group has its own r. All but the orthogonal one, whose B A
vanishes to rounding, start at exactly the base's function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from effect.context import Context
from effect.directions import contrast, eva_like
from effect.filet_forms import filet, filet_keep, filet_keep_both
from effect.groups import GROUPS, KEYS, SCALES, group_start
from effect.of_peft import BY_PEFT, starts_of
from effect.published import cg_lora, farss, lora_da, milora, whitened
from effect.start import Start
from effect.train import FROZEN

__all__ = ["START"]

Method = Callable[[Context], dict[str, Start]]

_SELECTIONS: dict[str, Any] = {"M": "min", "R": "random", "P": "max"}
_STARTS = ("zero", "untouched")
_MAGNITUDES: dict[str, tuple[str, ...]] = {
    "fisher": ("relative", "mean", "sum"),
    "singular": ("relative", "mean"),
    "constant": ("relative",),
    "constant_min": ("mean", "sum"),
    "constant_max": ("mean", "sum"),
}


def _filets() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for letter, how in _SELECTIONS.items():
        for start in _STARTS:
            for scaling, magnitudes in _MAGNITUDES.items():
                # At the relative magnitude one constant is as good as another.
                library: Any = "constant_max" if scaling == "constant" else scaling
                for size in magnitudes:
                    form = partial(filet, how=how, scaling=library, magnitude=size, start=start)
                    found[f"filet-{letter}.{scaling}.{size}.{start}"] = form
                    if size == "relative":
                        found[f"filet-{letter}-orthogonal.{scaling}.relative.{start}"] = partial(
                            form, orthogonal=True
                        )
    return found


def _contrasts() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for name, rows in (("contrast", False), ("contrast-row", True)):
        for delta in (1e-1, 1e-2, 1e-3):
            for power in (0.0, 0.25, 0.5):
                for start in _STARTS:
                    form = f"{name}.d{delta:g}" + (f".p{power:g}" if power else "")
                    form += ".untouched" if start == "untouched" else ""
                    found[form] = partial(
                        contrast, delta=delta, rows=rows, power=power, start=start
                    )
    return found


def _groups() -> dict[str, Method]:
    return {
        f"groups.{key}.{scale}.{number:02}": partial(
            group_start, key=key, scale=scale, number=number
        )
        for key in KEYS
        for scale in SCALES
        for number in range(GROUPS)
    }


START: dict[str, Method] = {
    **{name: partial(starts_of, method=name) for name in BY_PEFT},
    "milora": milora,
    "farss": farss,
    "cg-lora": cg_lora,
    "lora-da": lora_da,
    **{f"whitened.{start}": partial(whitened, start=start) for start in _STARTS},
    **_filets(),
    "eva-ref": partial(eva_like, power=0.0),
    "eva-ref.p-0.25": partial(eva_like, power=-0.25),
    "filet-keep.d0.1": partial(filet_keep, damping=0.1),
    "filet-keep.d0.01": partial(filet_keep, damping=0.01),
    "filet-keep.d0.01.self": partial(filet_keep, damping=0.01, own_text=True),
    "filet-keep.d0.01.both": partial(filet_keep_both, damping=0.01),
    **_contrasts(),
    **_groups(),
}
START |= {
    method + FROZEN: START[method]
    for method in ("lora", "filet-keep.d0.01", "filet-M-orthogonal.fisher.relative.zero")
}
