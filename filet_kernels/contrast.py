"""Directions of a layer's input that a task uses and other data, which is to be kept, does not.

With S and S₀ the second moments of the inputs of a layer y = Wx for the task and for the data to
keep, each over the mean of its eigenvalues, and a damping δ,
    S a = λ (S₀ + δ I) a.
λ is how much more of the task than of the rest there is along a, and the largest are wanted: where
a changes the layer, the task sees it most and the rest least.

A moment of y = Wx, of which there is S_y = W S Wᵀ, knows x in the row space of W only. With P such
that Pᵀ W Wᵀ P = I, the columns of Wᵀ P are an orthonormal basis of that space, in which the moments
are Pᵀ S_y P. The problem there is the same, with means over that space, and a = Wᵀ P z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from filet_kernels.moments import SecondMoment
from filet_kernels.orthonormal import added
from filet_kernels.product import slices

__all__ = ["contrast_directions"]

# Sizes up to which all eigenvectors are computed. Of 4096 that takes a GPU more than a second; the
# iteration multiplies the matrix about twenty times with somewhat more than r vectors.
_FULL = 1024

_BLOCKS = 6  # in the basis of the iteration: of what is kept, and of five products
_RESTARTS = 40  # after which all eigenvectors are computed; four are usual

# Residuals of the eigenvectors, over their eigenvalue and over the largest. Angles are off by that
# over the gap to the other eigenvalues, eigenvalues by its square.
_RESIDUAL, _ROUNDING = 1e-9, 1e-13
_DEFECT = 1e-9  # of an orthonormal basis, beyond which its eigenvalues are not to be trusted

_DAMPING = 1e-2  # one below it that is too small is the user's, to be made larger


@torch.no_grad()
def contrast_directions(
    W: Tensor, task: SecondMoment, keep: SecondMoment, rank: int, *, damping: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """The ``rank`` unit vectors of largest task moment over damped moment of what is to be kept.

    Args:
        W: (m, n) = (out, in), any floating dtype, any strides. Read in space "y" only.
        task, keep: moments of the layer's input, both in space "x" or both in "y". Sums and not
            means will do: neither count nor scale matters. One of nothing but zeros stays zero:
            with such a ``keep`` the directions are the principal ones of ``task``.
        rank: r, at most n; in space "y" at most the rank of W.
        damping: δ > 0, over the mean eigenvalue of ``keep``. It bounds λ, and says below which
            share of the mean what is kept does not count any more.

    Returns:
        A (r, n) float64 with rows of length 1, by descending λ, the entry of each that is largest
        in size positive; and λ (r,) float64. Rows are orthogonal in S₀ + δ I, not to each other.
        On W's device. Nothing is mutated; deterministic on the same device.

    Computed in float64: by Cholesky factors, and either all eigenvectors or, of large matrices, a
    block Lanczos iteration until the eigenvectors are right to about 1e-9 over their relative gaps.
    About six matrices of a moment's size in float64 exist at a time.

    In space "y" the rank of W is how many of its singular values are above √ε of the largest, ε of
    the moments' dtype: what W makes smaller than that is rounding of S_y, whose eigenvalues are
    their squares. It is less where a few tokens of ``keep`` are so much larger than the others that
    their rounding leaves eigenvalues below −δ, were δ 1e-2: the largest singular values alone count
    then.

    Raises:
        ValueError: moments of other spaces or shapes, a rank out of range, a damping that is not
            positive, or too small for moments that are rounded.
    """
    _check(W, task, keep, rank, damping)
    S, S0 = (_whole(moment, W.device) for moment in (task, keep))
    if task.space == "x":
        rows, values = _solved(S, _factored(S0, damping), rank, damping)
    else:
        P, S, factored = _known(W, S, S0, damping, torch.finfo(task.sum.dtype).eps ** 0.5)
        if rank > P.shape[1]:
            raise ValueError(
                f"rank={rank} exceeds the rank of W {tuple(W.shape)}, {P.shape[1]} to the "
                "precision of its moments; expected at most that with moments in space 'y'"
            )
        z, values = _solved(S, factored, rank, damping)
        coordinates = z @ P.T
        parts = slices(W.shape[1], max(W.shape))
        rows = torch.cat([coordinates @ W[:, part].double() for part in parts], 1)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign(), values


def _check(W: Tensor, task: SecondMoment, keep: SecondMoment, rank: int, damping: float) -> None:
    if W.dim() != 2:
        raise ValueError(f"W has shape {tuple(W.shape)}; expected (m, n)")
    m, n = W.shape
    sizes = {"x": n, "y": m}
    if task.space not in sizes or keep.space != task.space:
        raise ValueError(
            f"task is in space {task.space!r} and keep in {keep.space!r}; expected both in 'x' or "
            "both in 'y'"
        )
    size = sizes[task.space]
    for name, moment in (("task", task), ("keep", keep)):
        if moment.sum.shape != (size, size):
            raise ValueError(
                f"{name} has shape {tuple(moment.sum.shape)} in space {moment.space!r}; expected "
                f"({size}, {size}) for W of shape ({m}, {n})"
            )
    if not 1 <= rank <= size:
        raise ValueError(f"rank={rank}; expected 1 … {size}, the size of the moments")
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"damping={damping!r}; expected a positive number")


def _whole(moment: SecondMoment, device: torch.device) -> Tensor:
    """Both triangles of a moment, float64, as a new matrix."""
    lower = moment.sum.detach().to(device, torch.float64).tril()
    return lower + lower.tril(-1).T


def _known(
    W: Tensor, S: Tensor, S0: Tensor, damping: float, tolerance: float
) -> tuple[Tensor, Tensor, tuple[Tensor, int]]:
    """P (m, ρ) with Pᵀ W Wᵀ P = I, of what moments of y know of W's row space.

    That is the singular values above ``tolerance`` of the largest; of them the first ones alone
    where a few tokens are far larger than the others: their rounding, which P divides by the
    squares of the smaller ones, is more than the damping then, as eigenvalues below −δ show.

    Returns:
        P, Pᵀ S P, and of Pᵀ S₀ P what :func:`_factored` gives.
    """
    m, n = W.shape
    K = torch.zeros(m, m, dtype=torch.float64, device=W.device)
    for part in slices(n, max(m, n // 4)):
        columns = W[:, part].double()
        K.addmm_(columns, columns.T)
    P = _row_space(K, tolerance)
    task, keep = P.T @ S @ P, P.T @ S0 @ P
    factored, enough = _factored(keep, damping), max(damping, _DAMPING)
    if factored[1] and _factored(keep, enough)[1]:
        squares, U = (x.flip(-1) for x in torch.linalg.eigh(K))  # descending
        size = P.shape[1]
        P = U[:, :size] * squares[:size].rsqrt()
        task, keep = P.T @ S @ P, P.T @ S0 @ P
        for moment, least in ((task, enough), (keep, damping)):
            while order := _factored(moment[:size, :size], least)[1]:
                size = order - 1
        P, task = P[:, :size], task[:size, :size]
        factored = _factored(keep[:size, :size], damping)
    return P, task, factored


def _factored(S: Tensor, damping: float) -> tuple[Tensor, int]:
    """The Cholesky factor of S over its mean eigenvalue + δ I, and 0.

    Or the least order of which its leading block has an eigenvalue below 0, and no factor.
    """
    damped = _over_mean(S)
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    return factor, int(info)


def _row_space(K: Tensor, tolerance: float) -> Tensor:
    """P (m, ρ) with Pᵀ K P = I for K = W Wᵀ, of W's ρ singular values above ``tolerance`` of the
    largest.

    Of full rank P is the transposed inverse of a Cholesky factor. Else it comes from the singular
    vectors, which cost a hundred times as much.
    """
    m = K.shape[0]
    tolerance = max(tolerance, (m * torch.finfo(K.dtype).eps) ** 0.5)  # squares of less: rounding
    factor, info = torch.linalg.cholesky_ex(K)
    # Of the diagonal of R in Wᵀ = Q R: how far a row is from the rows before it.
    heights = factor.diagonal()
    if not int(info) and bool(heights.min() > 10 * tolerance * heights.max()):
        eye = torch.eye(m, dtype=K.dtype, device=K.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return inverse.T
    squares, U = torch.linalg.eigh(K)
    there = squares > tolerance**2 * squares[-1]
    P: Tensor = U[:, there] * squares[there].rsqrt()
    return P


def _solved(
    S: Tensor, factored: tuple[Tensor, int], rank: int, damping: float
) -> tuple[Tensor, Tensor]:
    """The top of S a = λ (S₀ + δ I) a, both over their mean eigenvalue: a as rows (r, n), and λ.

    ``factored``: of S₀, by :func:`_factored`.
    """
    factor, negative = factored
    if negative:
        raise ValueError(
            f"damping={damping!r} is too small: with it the moment to keep has eigenvalues below 0 "
            f"by the rounding of its sums; expected a larger one, {max(1e-2, 10 * damping):g} say"
        )
    half = torch.linalg.solve_triangular(factor, _over_mean(S), upper=False)
    M = torch.linalg.solve_triangular(factor, half.T, upper=False)
    del half, S
    M = (M + M.T).mul_(0.5)
    found = None
    if M.shape[0] > _FULL and _BLOCKS * _block(rank) <= M.shape[0] // 2:
        found = _iterated(M, rank)
    if found is None:
        values, vectors = torch.linalg.eigh(M)
        found = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    values, vectors = found
    return torch.linalg.solve_triangular(factor.T, vectors, upper=True).T, values.clamp_min(0)


def _over_mean(S: Tensor) -> Tensor:
    mean = S.diagonal().mean()
    return S / torch.where(mean > 0, mean, 1)


def _block(rank: int) -> int:
    """Vectors that are iterated at a time: some more than are wanted bring those in sooner."""
    return rank + max(8, rank // 4)


def _iterated(M: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The largest eigenvalues of M ≥ 0, descending, and their vectors; None where it does not work.

    Block Lanczos with a basis that is orthogonalised in full, restarted from its best vectors (of
    the "thick" kind: Wu and Simon, 2000). It waits for the device once a restart.
    """
    n, block = M.shape[0], _block(rank)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, block, generator=generator, dtype=M.dtype, device="cpu")
    V, MV = M.new_empty(2, n, _BLOCKS * block)
    following = added(start.to(M.device), V[:, :0])
    filled = 0
    for _ in range(_RESTARTS):
        for first in range(filled, V.shape[1], block):
            columns = slice(first, first + block)
            V[:, columns] = following
            MV[:, columns] = following = M @ following
            following = added(following, V[:, : columns.stop])
        T = V.T @ MV
        if not bool(T.isfinite().all()):
            return None
        values, s = torch.linalg.eigh((T + T.T) / 2)
        values, s = values.flip(0)[:block], s.flip(1)[:, :block]
        best, M_best = V @ s, MV @ s
        wanted = values[:rank]
        residuals = torch.linalg.vector_norm(M_best - best * values, dim=0)[:rank]
        allowed = _RESIDUAL * wanted.abs() + _ROUNDING * values[0].abs()
        defect = (best.T @ best).sub_(torch.eye(block, dtype=M.dtype, device=M.device)).abs().max()
        right, whole = torch.stack([(residuals <= allowed).all(), defect <= _DEFECT]).tolist()
        if not whole:
            return None
        if right:
            return wanted, best[:, :rank]
        V[:, :block], MV[:, :block], filled = best, M_best, block
    return None
