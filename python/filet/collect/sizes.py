"""Bytes and operations that follow from the shapes of weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from filet.model.targets import Target

__all__ = ["moment_bytes", "relative_cost", "selection_bytes", "weight_bytes"]


def moment_bytes(
    targets: dict[str, Target], shared_input: Mapping[str, str], keep: bool = False
) -> dict[str, tuple[int, int]]:
    """Bytes of each module's moments: input, output. A shared input moment counts once.

    ``keep``: with a second input moment, of data to keep.
    """
    sizes = {}
    for name, target in targets.items():
        side = min(target.shape) ** 2 * target.sums[0].itemsize
        sizes[name] = (0 if name in shared_input else side * (1 + keep), side)
    return sizes


def weight_bytes(model: nn.Module, device: torch.device) -> int:
    """Of all parameters and buffers on a device."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device == device}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def selection_bytes(
    targets: Sequence[Target], shared_input: Mapping[str, str], keep: bool = False
) -> int:
    """Bytes of :func:`filet_kernels.fisher_energies`, the largest layer's, and of A and B.

    On a GPU four matrices of a moment's size, the weight's float16 parts and two slices of 64 MiB;
    else Gram matrices and copies of the weight in float64. A and B need less after that, one copy
    of the weight. ``keep``: of :func:`filet_kernels.contrast_directions` instead, six matrices of
    a moment's size in float64, and slices of the weight.
    """
    most = factors = 0
    for target in targets:
        m, n = target.shape
        item = target.sums[0].itemsize
        d = n if target.name in shared_input else min(m, n)
        if keep:
            energies = 8 * (6 * d**2 + m * max(m, n // 4))
        elif item == 8 or target.device.type != "cuda":
            energies = 8 * (4 * m * n + 2 * d**2)
        else:
            energies = 16 * d**2 + 4 * m * n + 2**27
        if target.values.quantised:
            energies += m * n * target.values.dtype.itemsize
        most = max(most, energies)
        factors += item * target.rank * (m + n)
    return most + factors


def relative_cost(
    targets: dict[str, Target], moments: Mapping[str, tuple[int, int]], gpus: bool
) -> float:
    """Operations of the moments over those of the layers' forward and backward.

    A token costs a layer 4 m n, a moment of size d half of 2 d² where only the lower triangle is
    formed (on a GPU, where y and h come from the layers' own products). On a CPU they are formed
    once more and the products are whole.
    """
    layers = extra = 0
    for name, target in targets.items():
        m, n = target.shape
        layers += 4 * m * n
        for size, anew in zip(moments[name], (m < n, n < m), strict=True):
            if size:
                extra += min(m, n) ** 2 * (1 if gpus else 2)
                extra += 2 * m * n if anew and not gpus else 0
    return extra / layers
