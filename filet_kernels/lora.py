"""From energies to LoRA factors: selection, scaling, A, B and the residual weight.

FILet (arXiv 2605.01046, Algorithm 1, equations 13-19): with I the chosen directions,
    A = diag(c)^½ V̂_Iᵀ (r, n),   B = Û_I diag(c)^½ (m, r),   W_res = W − s B A,
where c = E_I in the paper's main method and s is the LoRA scaling of the layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from filet_kernels.product import exact_float32

__all__ = ["Scaling", "Selection", "lora_factors", "residual_weight", "select"]

Selection = Literal["min", "max", "random"]
Scaling = Literal["fisher", "singular", "constant_min", "constant_max"]


def select(energies: Tensor, rank: int, how: Selection = "min", *, seed: int = 0) -> Tensor:
    """Choose ``rank`` of the candidate directions (the paper's FILet-M, -P and -R).

    Args:
        energies: (n,) floating; NaN marks a direction that is no candidate and is never chosen.
        rank: how many, at least 1.
        how: "min" takes the smallest energies in ascending order, "max" the largest in descending
            order, "random" a uniform draw without replacement. Ties go to the lower index.
        seed: of the random draw; the draw is made on the CPU and is the same on every device.

    Returns:
        (rank,) int64 indices on the device of ``energies``. Deterministic.

    Raises:
        ValueError: fewer candidates than ``rank``, a rank below 1, or an unknown ``how``.
    """
    if energies.dim() != 1:
        raise ValueError(f"energies has shape {tuple(energies.shape)}; expected (n,)")
    if rank < 1:
        raise ValueError(f"rank={rank}; expected at least 1")
    candidates = (~energies.isnan()).nonzero().squeeze(1)
    if rank > candidates.numel():
        raise ValueError(
            f"rank={rank} exceeds the {candidates.numel()} candidate directions (non-zero columns "
            f"of W, of {energies.numel()} in all); expected a rank of at most that"
        )
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(candidates.numel(), generator=generator).to(candidates.device)
    elif how in ("min", "max"):
        keys = energies[candidates] if how == "min" else -energies[candidates]
        # Only what can be chosen is sorted: 14336 energies take a CPU 1 ms, of every layer.
        few = (keys <= keys.topk(rank, largest=False).values.amax()).nonzero().squeeze(1)
        order = few[torch.argsort(keys[few], stable=True)]
    else:
        raise ValueError(f"how={how!r}; expected 'min', 'max' or 'random'")
    return candidates[order[:rank]]


def lora_factors(
    W: Tensor,
    energies: Tensor,
    indices: Tensor,
    *,
    scaling: Scaling = "fisher",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """LoRA factors A = diag(c)^½ V̂_Iᵀ and B = Û_I diag(c)^½ of the chosen directions.

    Args:
        W: (m, n), any floating dtype, any strides.
        energies: (n,) as :func:`filet_kernels.fisher_energies` returns them.
        indices: (r,) int64, the chosen directions I; with the energies, on any device. On the CPU
            they are checked without waiting for W's device.
        scaling: c, one factor a direction. "fisher": c_i = E_i, the paper's main method; "singular"
            (FILet-SVD): c_i = ‖W v̂_i‖, so that B A = W V̂_I V̂_Iᵀ; "constant_min" and
            "constant_max" (equation 10): the smallest or largest E over I for all of them.
        dtype: of the returned factors; they are computed in float64.

    Returns:
        A (r, n) and B (m, r), contiguous, on W's device. Nothing is mutated; deterministic.

    Raises:
        ValueError: shapes that do not fit, an index that is no candidate, an unknown scaling.
    """
    n = W.shape[1]
    if energies.shape != (n,):
        raise ValueError(
            f"energies has shape {tuple(energies.shape)}; expected ({n},), W's columns"
        )
    if indices.dim() != 1 or indices.numel() == 0:
        raise ValueError(f"indices has shape {tuple(indices.shape)}; expected (r,) with r ≥ 1")
    chosen = energies[indices].double()
    if chosen.isnan().any():
        raise ValueError("indices names a zero column of W, which has no direction")
    chosen, indices = (x.to(W.device, non_blocking=True) for x in (chosen, indices))
    W = W.detach().double()
    V = torch.nn.functional.normalize(W.T @ W[:, indices], dim=0, eps=0)
    WV = W @ V
    singular = torch.linalg.vector_norm(WV, dim=0)
    if scaling == "fisher":
        c = chosen
    elif scaling == "singular":
        c = singular
    elif scaling in ("constant_min", "constant_max"):
        c = (chosen.min() if scaling == "constant_min" else chosen.max()).expand_as(chosen)
    else:
        raise ValueError(
            f"scaling={scaling!r}; expected 'fisher', 'singular', 'constant_min' or 'constant_max'"
        )
    A = c.sqrt().unsqueeze(1) * V.T
    B = (WV / singular) * c.sqrt()
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def residual_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W_res = W − scale · B A, from A and B as they are stored.

    Args:
        W: (m, n), any floating dtype, any strides.
        A: (r, n), B: (m, r), the factors in the dtype in which the adapter keeps them.
        scale: the LoRA scaling s of the layer.

    Returns:
        (m, n) in W's dtype, computed in float32 (float64 where W is float64) and rounded once.
        Nothing is mutated; deterministic on the same device.

    Raises:
        ValueError: shapes that do not fit together.
    """
    m, n = W.shape
    if A.dim() != 2 or A.shape[1] != n or B.shape != (m, A.shape[0]):
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)}; expected (r, {n}) and ({m}, r) for W"
        )
    compute = torch.float64 if W.dtype == torch.float64 else torch.float32
    A, B = A.detach().to(compute), B.detach().to(compute)
    with exact_float32():
        return torch.addmm(W.detach().to(compute), B, A, alpha=-scale).to(W.dtype)
