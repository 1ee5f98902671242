"""Fisher energies of a layer's candidate directions, from its weight and two second moments.

The paper (arXiv 2605.01046, Algorithm 1) scores direction i of W (m, n) = (out, in) with
    V̂ = normalize_columns(WᵀW),   Û = normalize_columns(W V̂),
    E_i = (v̂_iᵀ S_X v̂_i) (û_iᵀ S_Y û_i).
With G = WᵀW, K = WWᵀ, y = Wx and h = Wᵀg, the two factors are also
    e_x = diag(G S_X G) / diag(G²)         = diag(Wᵀ C_y W) / diag(G²),
    e_y = diag((KW)ᵀ S_Y (KW)) / diag(G³)  = diag(G C_h G) / diag(G³),
so each moment may be taken in the smaller of the two spaces, and V̂, Û need not exist. Where m < n
neither does G: diag(G²) = diag(Wᵀ KW), diag(G³) = diag((KW)ᵀ KW), and a moment S of the larger
space all the same (of an input that other layers share) is taken to the smaller one:
diag(G S G) = diag(Wᵀ (W S Wᵀ) W).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from filet_kernels.congruence import congruence
from filet_kernels.moments import Moments, SecondMoment
from filet_kernels.product import column_sums, mirror_, product, slices, split, transposed
from filet_kernels.quadform import Precision, quadform_diag
from filet_kernels.syrk import syrk_

__all__ = ["Normalization", "fisher_energies"]

Normalization = Literal["mean", "sum"]

# Rows of W whose products enter a Gram matrix between two roundings: the tensor cores cut off what
# they add below the last bit. In an emulation of that on SmolLM2-135M sums of 12288 rows changed
# energies by up to 2e-5, sums of 2048 by 7e-6.
_ROWS_A_SUM = 4096

# Rows of the smallest moment whose size temporaries may have, whatever the layer's is: 4 MiB. In a
# layer of so few outputs, less than inputs, all are quadratic forms of W with m × m matrices:
# diag(G³) = diag(Wᵀ K² W), and of g with K S_g K. KW, 4 MiB of it at a time, would take so many
# launches that a slow host does not keep up (docs/kernels.md).
_LEAST = 1024

_ALL = slice(None)


def fisher_energies(
    W: Tensor,
    moments: Moments,
    *,
    normalization: Normalization = "mean",
    precision: Precision = "accurate",
    columns: slice = _ALL,
) -> Tensor:
    """Fisher energy E_i of every candidate direction i of a layer.

    Args:
        W: (m, n) = (out, in), any floating dtype, any strides; on the moments' device.
        moments: the layer's second moments, in any of the four spaces.
        normalization: "mean", the paper's: g is the gradient of the mean loss over all the loss
            terms that the moments saw; "sum": of the summed loss. They differ by the factor
            ``loss_terms²``, so the ranking is the same.
        precision: of the moments' quadratic forms, see :func:`filet_kernels.quadform_diag`.
        columns: of these candidates alone, one to a column of W, by default of all. A candidate's
            energy does not depend on the others but for rounding; every part takes the Gram matrix
            of W anew, which is a small part of the whole (docs/kernels.md).

    Returns:
        (n,) float64, or as many as ``columns``; non-negative (a rounding below 0 becomes 0). NaN
        marks what is no candidate: a zero column of W has no direction. A layer that saw no token
        has energy 0 everywhere. Nothing is mutated; deterministic on the same device.

    Computed in float64, except on a GPU from a W and moments of at most float32: there in products
    of float32's precision on the tensor cores, of which no temporary is larger than a moment of the
    smaller space, or 4 MiB where that is more (but with moments of y or g where m > n, which
    :meth:`Moments.zeros` does not make).

    Raises:
        ValueError: moments of another shape than W, or an unknown normalization.
    """
    m, n = moments.shape
    if W.shape != (m, n):
        raise ValueError(f"W has shape {tuple(W.shape)}; expected ({m}, {n}), as its moments")
    if normalization not in ("mean", "sum"):
        raise ValueError(f"normalization={normalization!r}; expected 'mean' or 'sum'")
    W = W.detach()
    dtypes = {W.dtype, moments.input.sum.dtype, moments.output.sum.dtype}
    if W.is_cuda and torch.float64 not in dtypes:
        factors = _factors_float32(W, moments, precision, columns=columns)
    else:
        factors = _factors_float64(W, moments, precision, columns)
    (input_form, squares), (output_form, cubes) = factors
    energies = input_form.clamp_min_(0) / squares  # 0 / 0 of a zero column is NaN
    energies *= output_form.clamp_min_(0) / cubes
    divisors = [moments.input.count, moments.output.count]
    if normalization == "mean":
        divisors += 2 * [moments.loss_terms]
    # One number first: each pass over the energies is a launch, which is what they cost.
    divisors = [divisor.to(W.device) for divisor in divisors]
    energies /= torch.stack(divisors).clamp_min_(1).prod(dtype=torch.float64)
    return energies


# Quadratic form of the summed moment and squared norm, both of the input's and of the output's
# directions. The directions are not normalised: of each, only the ratio of the two means anything.
_Factors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _factors_float64(W: Tensor, moments: Moments, precision: Precision, columns: slice) -> _Factors:
    m, n = W.shape
    W = W.double()
    V = W[:, columns]
    # W G = K W, through the smaller of the two Gram matrices.
    gram = W.T @ W if n <= m else W @ W.T
    WG = W @ gram[:, columns] if n <= m else gram @ V
    G = gram[:, columns]  # of n <= m; else nobody asks for it
    directions = {"x": G, "h": G, "y": V, "g": WG}

    def form(moment: SecondMoment) -> Tensor:
        S, of = moment.sum, directions[moment.space]
        if m < n and moment.space in ("x", "h"):
            S, of = congruence(W, S, _floats(m, n) // m), V
        return quadform_diag(S, of, precision=precision)

    return (
        (form(moments.input), (V * WG).sum(0)),  # diag(G²) = diag(Wᵀ K W)
        (form(moments.output), (WG * WG).sum(0)),  # diag(G³)
    )


def _factors_float32(
    W: Tensor,
    moments: Moments,
    precision: Precision,
    backend: str | None = None,
    columns: slice = _ALL,
) -> _Factors:
    """The same in products of float32's precision, with ``backend``'s quadratic forms."""
    m, n = W.shape
    S = {moment.space: moment.sum for moment in (moments.input, moments.output)}
    forms: dict[str, Tensor] = {}  # of each moment, by its space
    floats = _floats(m, n)

    def form(S: Tensor, V: Tensor, precision: Precision = precision) -> Tensor:
        q: Tensor = torch.ops.filet_kernels.quadform_diag(S, V, precision, backend, 4 * floats)
        return q

    V = W[:, columns]
    if n <= m:
        gram = _gram(W)
        left, right = W, gram[:, columns]
        squares = column_sums(gram)[0][columns]
        if "g" not in S:
            cubes = form(gram, right, "accurate")
        del gram  # a view of it is left
    else:
        left, right = _gram(W.T), V
    small = m < n and m <= _LEAST
    if small:
        squares, cubes = form(left, V, "accurate"), form(_gram(left), V, "accurate")
        if "g" in S:
            forms["g"] = form(congruence(left, S["g"], m, backend), V)
    for space in S.keys() & {"x", "h"}:
        smaller = S[space] if n <= m else congruence(W, S[space], floats // m, backend)
        forms[space] = form(smaller, right)
    if "y" in S:
        forms["y"] = form(S["y"], V)
    if not small and (m < n or "g" in S):  # WG = KW
        of_g: list[Tensor] = []
        of_cubes: list[Tensor] = []
        of_squares: list[Tensor] = []
        a = split(left)
        del left
        for part in slices(right.shape[1], max(floats // m // 128, 1) * 128):  # whole tiles
            WG, scale = product(a, split(right[:, part], columns=True))
            norms, products = column_sums(WG, right[:, part] if m < n else None)
            if "g" in S:  # both of WG as it is scaled
                of_g.append(form(S["g"], WG))
                of_cubes.append(norms)
            else:
                of_cubes.append(norms / scale**2)
            if m < n:
                of_squares.append(products / scale)
        cubes = _joined(of_cubes)
        if "g" in S:
            forms["g"] = _joined(of_g)
        if m < n:
            squares = _joined(of_squares)
    return (
        (forms[moments.input.space], squares),
        (forms[moments.output.space], cubes),
    )


def _floats(m: int, n: int) -> int:
    """How many numbers in float32 a temporary may have."""
    return max(min(m, n), _LEAST) ** 2


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gram(X: Tensor) -> Tensor:
    """XᵀX, float32, both triangles."""
    n = X.shape[1]
    copied = max(n, _LEAST) ** 2 * 4 // (n * X.element_size())  # rows at a time, where they are
    G = torch.zeros(n, n, dtype=torch.float32, device=X.device)
    for rows in slices(X.shape[0], min(_ROWS_A_SUM, copied)):
        part = X[rows]
        # The CUDA kernel takes contiguous rows only: for the WWᵀ of a 4096 × 14336 W copies and it
        # are faster than the Triton kernel without a copy (0.75 and 1.97 ms, H200).
        syrk_(G, part if part.stride(1) == 1 else transposed(part.T))
    return mirror_(G)
