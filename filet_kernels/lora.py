"""From energies to LoRA factors: selection, scaling, A, B and the residual weight.

FILet (arXiv 2605.01046, Algorithm 1, equations 13-19): with I the chosen directions,
    A = diag(c)^½ V̂_Iᵀ (r, n),   B = Û_I diag(c)^½ (m, r),   W_res = W − s B A,
where c = E_I in the paper's main method and s is the LoRA scaling of the layer. With γ given, c is
taken over its mean, times γ: the proportions stay, the magnitude is γ's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from filet_kernels.orthonormal import gram_schmidt
from filet_kernels.product import exact_float32

__all__ = [
    "Scaling",
    "Selection",
    "lora_factors",
    "residual_weight",
    "residual_weight_",
    "select",
]

Selection = Literal["min", "max", "random"]
Scaling = Literal["fisher", "singular", "constant_min", "constant_max"]

# Of γ, below which no c falls: a row of A that is zero would never train beside a B of zero. It is
# far below what energies do. On SmolLM2-135M (r = 32, 32 samples of GSM8K) the smallest of the 32
# over their mean is 0.22 in the layer where that is least, of the largest energies 0.016, and of 32
# random ones 5e-4.
_LEAST = 1e-4


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
    if how not in ("min", "max", "random"):
        raise ValueError(f"how={how!r}; expected 'min', 'max' or 'random'")
    if how == "random":
        candidates = (~energies.isnan()).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(candidates.numel(), generator=generator, device="cpu").to(
            candidates.device
        )
        chosen = candidates[order[:rank]]
    else:
        keys = energies if how == "min" else -energies
        # Only what can be chosen is gathered and sorted: 14336 energies take a CPU 1 ms, of every
        # layer. NaN comes last in topk, and is not even equal to itself.
        last = keys.topk(min(rank, keys.numel()), largest=False).values[-1:]
        few = (keys <= last).nonzero().squeeze(1)
        chosen = few.index_select(0, keys.index_select(0, few).argsort(stable=True)[:rank])
    if chosen.numel() < rank:
        raise ValueError(
            f"rank={rank} exceeds the {int((~energies.isnan()).sum())} candidate directions "
            f"(non-zero columns of W, of {energies.numel()} in all); expected a rank of at most "
            "that"
        )
    return chosen


def lora_factors(
    W: Tensor,
    energies: Tensor,
    indices: Tensor,
    *,
    scaling: Scaling = "fisher",
    gamma: float | None = None,
    orthogonal: bool = False,
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
        gamma: γ > 0 takes c over its mean over I, times γ, so that c does not depend on the unit of
            the energies. At γ = 1/3 the mean of ‖A_i‖² is that of LoRA's default, whose entries
            have the variance 1/(3n). No c is then below 1e-4 γ, and where all are 0 each is γ.
            None leaves c as it is.
        orthogonal: takes Q of V̂_I = Q R, with a positive diagonal and in the order of ``indices``,
            for V̂_I, and normalize_columns(W Q) for Û_I. Directions of low energy lie close
            together: the first stays, and of every other what it adds. What becomes of one that
            adds nothing but rounding is a row of length √c in some direction, beside a column of
            B that is 0 where W takes it to 0.
        dtype: of the returned factors, to which they are rounded once.

    Returns:
        A (r, n) and B (m, r), contiguous, on W's device. Nothing is mutated; deterministic.

    Computed in float64, except on a GPU from a W of at most float32: there by products of float32's
    precision. W is copied to that dtype.

    Raises:
        ValueError: shapes that do not fit, an index that is no candidate, an unknown scaling, a γ
            that is not positive.
    """
    n = W.shape[1]
    if energies.shape != (n,):
        raise ValueError(
            f"energies has shape {tuple(energies.shape)}; expected ({n},), W's columns"
        )
    if indices.dim() != 1 or indices.numel() == 0:
        raise ValueError(f"indices has shape {tuple(indices.shape)}; expected (r,) with r ≥ 1")
    if scaling not in ("fisher", "singular", "constant_min", "constant_max"):
        raise ValueError(
            f"scaling={scaling!r}; expected 'fisher', 'singular', 'constant_min' or 'constant_max'"
        )
    if gamma is not None and not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma!r}; expected a positive number, or None")
    c = energies.index_select(0, indices).double()
    if c.isnan().any():
        raise ValueError("indices names a zero column of W, which has no direction")
    if scaling.startswith("constant"):
        c = (c.min() if scaling == "constant_min" else c.max()).expand_as(c)
    # The few numbers on the host cost less than a launch each.
    root, indices = (x.to(W.device, non_blocking=True) for x in (_root(c, gamma), indices))
    compute = torch.float32 if W.is_cuda and W.dtype != torch.float64 else torch.float64
    singular = scaling == "singular"
    return _factors(W, indices, None if singular else root, compute, dtype, gamma, orthogonal)


def _root(c: Tensor, gamma: float | None) -> Tensor:
    """diag(c)^½; with γ that of c over its mean, times γ."""
    if gamma is None:
        return c.sqrt()
    # Where all are 0 this is not a number, and then each is γ. Nothing waits for a GPU.
    relative = (c / c.mean()).nan_to_num(nan=1.0)
    return (gamma * relative.clamp_min(_LEAST)).sqrt()


def _factors(
    W: Tensor,
    indices: Tensor,
    root: Tensor | None,
    compute: torch.dtype,
    dtype: torch.dtype,
    gamma: float | None = None,
    orthogonal: bool = False,
) -> tuple[Tensor, Tensor]:
    """A and B by products in ``compute``.

    ``root`` is diag(c)^½; None for the singular scaling, whose c comes from the products, with γ.
    """
    W = W.detach().to(compute)
    with exact_float32(), torch.autocast(W.device.type, enabled=False):
        V = W.T @ W.index_select(1, indices)
        if orthogonal:
            lengths = torch.linalg.vector_norm(V, dim=0, dtype=torch.float64)
            V = gram_schmidt(V / lengths).to(compute)
        WV = W @ V
    # Neither is normalised before, and squares of a small column's are out of float32's range.
    of_V, of_WV = (torch.linalg.vector_norm(x, dim=0, dtype=torch.float64) for x in (V, WV))
    if root is None:
        root = _root(of_WV / of_V, gamma)
    A, B = (V.new_empty(shape, dtype=dtype) for shape in (V.T.shape, WV.shape))
    torch.mul(V.T, (root / of_V).unsqueeze(1), out=A)
    # W takes some direction that rounding made to nothing: its column is 0, and not 0 / 0.
    torch.mul(WV, root / torch.where(of_WV > 0, of_WV, 1), out=B)
    return A, B


def residual_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W_res = W − scale · B A, from A and B as they are stored.

    Args:
        W: (m, n), any floating dtype, any strides.
        A: (r, n), B: (m, r), the factors in the dtype in which the adapter keeps them.
        scale: the LoRA scaling s of the layer.

    Returns:
        (m, n) in W's dtype, computed in float32 for a W in bfloat16 or float16 and in float64
        otherwise, and rounded once. Nothing is mutated; deterministic on the same device.

    Raises:
        ValueError: shapes that do not fit together.
    """
    return _residual(W, A, B, scale).to(W.dtype)


def residual_weight_(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W ← W_res in place, the same as :func:`residual_weight` to the bit.

    Arguments and errors are its. Allocates one matrix of W's shape, in float32 for a W in bfloat16
    or float16 and in float64 otherwise.

    Returns:
        () in that dtype, the largest |W_res + scale · B A − W|: what rounding to W's dtype costs,
        which is 0 for a float64 W. It is not waited for.
    """
    W = W.detach()
    exact = _residual(W, A, B, scale)
    W.copy_(exact)
    largest: Tensor = torch.linalg.vector_norm(exact.sub_(W), torch.inf)
    return largest


def _residual(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W − scale · B A before it is rounded to W's dtype."""
    m, n = W.shape
    if A.dim() != 2 or A.shape[1] != n or B.shape != (m, A.shape[0]):
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)}; expected (r, {n}) and ({m}, r) for W"
        )
    compute = torch.float32 if W.element_size() == 2 else torch.float64
    A, B = A.detach().to(compute), B.detach().to(compute)
    residual = W.new_empty(m, n, dtype=compute)
    with exact_float32(), torch.autocast(W.device.type, enabled=False):
        torch.addmm(residual, B, A, beta=0, alpha=-scale, out=residual)
    # With W as addmm's summand a GPU would copy W to that dtype, and then the copy once more.
    return residual.add_(W.detach())
