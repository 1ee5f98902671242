"""The generalised eigenvectors of task against keep, against LAPACK's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from filet_kernels import SecondMoment, contrast, contrast_directions

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(n: int, seed: int, outliers: int = 0, decay: float = 0.5) -> Tensor:
    """Rows whose principal directions decay, with channels that are much larger than the rest."""
    scale = torch.arange(1, n + 1, dtype=F64) ** -decay
    x = (normal(3 * n, n, seed=seed) * scale) @ torch.linalg.qr(normal(n, n, seed=seed + 1))[0]
    x[:, :outliers] *= 200
    return x


def moment(v: Tensor, space: Any = "x", dtype: torch.dtype = F64) -> SecondMoment:
    """The moment of rows v, with numbers above the diagonal that nobody may read."""
    S = (v.T @ v).to(dtype).tril()
    S += torch.full_like(S, 7e9).triu(1)
    return SecondMoment(space, S, torch.tensor(len(v)))


def oracle(x: Tensor, x0: Tensor, damping: float = 1e-2) -> tuple[Tensor, Tensor]:
    """All directions as rows of length 1, and λ, descending."""
    S, S0 = x.T @ x, x0.T @ x0
    S, S0 = S / S.diagonal().mean(), S0 / S0.diagonal().mean()
    eye = torch.eye(len(S), dtype=F64)
    values, vectors = scipy.linalg.eigh(S.numpy(), (S0 + damping * eye).numpy())
    rows = torch.from_numpy(vectors.T[::-1].copy())
    return rows / rows.norm(dim=1, keepdim=True), torch.from_numpy(values[::-1].copy())


def angle(A: Tensor, B: Tensor) -> float:
    """The sine of the largest angle between the spaces of two sets of rows."""
    P, Q = (torch.linalg.qr(each.T)[0] for each in (A, B))
    return float(torch.linalg.matrix_norm(Q - P @ (P.T @ Q), 2))


@pytest.mark.parametrize("rank", [1, 7, 31, 47, 48])
@pytest.mark.parametrize("outliers", [0, 3])
def test_small_ones_are_lapacks(rank: int, outliers: int, device: torch.device) -> None:
    x, x0 = inputs(48, 1, outliers), inputs(48, 5, outliers)
    rows, values = oracle(x, x0)
    task, keep = (moment(v.to(device)) for v in (x, x0))
    A, found = contrast_directions(torch.ones(9, 48, device=device), task, keep, rank)
    assert A.shape == (rank, 48) and A.dtype == F64 and found.shape == (rank,)
    A, found = A.cpu(), found.cpu()
    torch.testing.assert_close(found, values[:rank], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(A.norm(dim=1), torch.ones(rank, dtype=F64))
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    # One by one: the eigenvalues are apart.
    torch.testing.assert_close((A * rows[:rank]).sum(1).abs(), torch.ones(rank, dtype=F64))


@pytest.mark.parametrize("rank", [1, 16, 24])
@pytest.mark.parametrize("outliers", [0, 3])
def test_large_ones_are_iterated_to_the_same(
    rank: int, outliers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 400
    x, x0 = inputs(n, 1, outliers), inputs(n, 5, outliers, decay=0.3)
    rows, values = oracle(x, x0)
    monkeypatch.setattr(contrast, "_FULL", n - 1)
    monkeypatch.setattr(torch.linalg, "eigh", limited(torch.linalg.eigh, n - 1))
    A, found = contrast_directions(torch.ones(1, n), moment(x), moment(x0), rank)
    torch.testing.assert_close(found, values[:rank], rtol=1e-9, atol=0)
    assert angle(A, rows[:rank]) < 1e-7


def limited(eigh: Any, most: int) -> Any:
    """eigh that refuses what is larger: the iteration is not to fall back on it."""

    def checked(M: Tensor) -> Any:
        assert len(M) <= most
        return eigh(M)

    return checked


def test_eigenvalues_that_are_close_at_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ_8 … λ_11 within 1e-5: the iteration tells the eighth from the ninth."""
    n = 300
    monkeypatch.setattr(contrast, "_FULL", 0)
    Q = torch.linalg.qr(normal(n, n, seed=3))[0]
    spectrum = torch.linspace(1.0, 0.1, n, dtype=F64)
    spectrum[:11] = 5 - torch.tensor([-4, -3, -2, -1, -0.9, -0.8, -0.7, 0, 1e-5, 2e-5, 3e-5])
    x = spectrum.sqrt().unsqueeze(1) * Q.T
    flat = torch.linalg.qr(normal(n, n, seed=4))[0]
    monkeypatch.setattr(torch.linalg, "eigh", limited(torch.linalg.eigh, n - 1))
    A, values = contrast_directions(torch.ones(1, n), moment(x), moment(flat), 8)
    expected = spectrum / spectrum.mean() / 1.01
    torch.testing.assert_close(values, expected[:8], rtol=1e-10, atol=0)
    assert angle(A, Q.T[:8]) < 1e-5


def test_what_cannot_be_iterated_is_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of 30 tokens: a basis of the iteration has no 168 directions to find."""
    monkeypatch.setattr(contrast, "_FULL", 0)
    x, x0 = inputs(400, 1)[:30], inputs(400, 5)
    rows, values = oracle(x, x0)
    A, found = contrast_directions(torch.ones(1, 400), moment(x), moment(x0), 20)
    torch.testing.assert_close(found, values[:20], rtol=1e-9, atol=0)
    assert angle(A, rows[:20]) < 1e-8


@pytest.mark.parametrize("m", [24, 40])
def test_space_y_of_full_column_rank_is_space_x(m: int) -> None:
    """rank(W) = n, so that the row space is the whole: the problem is the same to the damping."""
    x, x0, W = inputs(24, 1, 2), inputs(24, 5, 2), normal(m, 24, seed=9)
    A, values = contrast_directions(W, moment(x), moment(x0), 24, damping=0.3)
    B, others = contrast_directions(W, moment(x @ W.T, "y"), moment(x0 @ W.T, "y"), 24, damping=0.3)
    torch.testing.assert_close(others, values, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(B, A, rtol=0, atol=1e-6)


def test_space_y_is_space_x_within_the_rows_of_W() -> None:
    x, x0, W = inputs(40, 1, 2), inputs(40, 5, 2), normal(16, 40, seed=9)
    basis = torch.linalg.qr(W.T)[0]  # (40, 16)
    rows, values = oracle(x @ basis, x0 @ basis)
    A, found = contrast_directions(W, moment(x @ W.T, "y"), moment(x0 @ W.T, "y"), 9)
    torch.testing.assert_close(found, values[:9], rtol=1e-8, atol=0)
    assert angle(A, rows[:9] @ basis.T) < 1e-7


@pytest.mark.parametrize("how", ["dead rows", "equal rows", "dead columns", "sum of rows"])
def test_weights_of_lower_rank(how: str) -> None:
    x, x0, W = inputs(40, 1, 2), inputs(40, 5, 2), normal(16, 40, seed=9)
    if how == "dead rows":
        W[3:6] = 0
    elif how == "equal rows":
        W[5] = W[9]
    elif how == "dead columns":
        W[:, :30] = 0
    else:
        W[15] = W[:15].sum(0)
    found = int(torch.linalg.matrix_rank(W))
    assert found < 16
    y, y0 = moment(x @ W.T, "y"), moment(x0 @ W.T, "y")
    basis = torch.linalg.svd(W, full_matrices=False)[2][:found].T
    rows, values = oracle(x @ basis, x0 @ basis)
    A, eigenvalues = contrast_directions(W, y, y0, found)
    assert A.isfinite().all()
    torch.testing.assert_close(eigenvalues, values, rtol=1e-6, atol=1e-9)
    assert angle(A[:5], rows[:5] @ basis.T) < 1e-6
    with pytest.raises(ValueError, match=rf"rank={found + 1} exceeds the rank of W \(16, 40\)"):
        contrast_directions(W, y, y0, found + 1)


def test_float32_sums_change_little() -> None:
    x, x0 = inputs(64, 1, 2), inputs(64, 5, 2)
    rows, values = oracle(x, x0)
    sums = [moment(v, dtype=torch.float32) for v in (x, x0)]
    A, found = contrast_directions(torch.ones(3, 64).bfloat16(), *sums, 8)
    # Sums err by 2⁻²⁴ of the outliers' squares, 1e4 of the mean, and the damping is 1e-2.
    torch.testing.assert_close(found, values[:8], rtol=1e-3, atol=0)
    assert angle(A, rows[:8]) < 1e-3


def test_scale_and_count_do_not_matter_and_nothing_is_changed() -> None:
    x, x0, W = inputs(32, 1), inputs(32, 5), normal(8, 32, seed=2)
    task, keep = moment(x), moment(x0)
    before = task.sum.clone(), keep.sum.clone(), W.clone()
    A, values = contrast_directions(W, task, keep, 4)
    B, others = contrast_directions(W, moment(x * 1e-9), moment(x0 * 1e9), 4)
    torch.testing.assert_close(B, A)
    torch.testing.assert_close(others, values)
    assert all(torch.equal(*pair) for pair in zip(before, (task.sum, keep.sum, W), strict=True))


def test_nothing_to_keep_leaves_the_principal_directions() -> None:
    x = inputs(32, 1)
    A, _ = contrast_directions(torch.ones(3, 32), moment(x), moment(0 * x), 5)
    assert angle(A, torch.linalg.svd(x)[2][:5]) < 1e-7
    A, values = contrast_directions(torch.ones(3, 32), moment(0 * x), moment(x), 5)
    assert A.isfinite().all() and not values.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"rank=0; expected 1 … 6"),
        ({"rank": 7}, r"rank=7; expected 1 … 6"),
        ({"damping": 0.0}, r"damping=0.0; expected a positive number"),
        ({"damping": float("nan")}, r"damping=nan; expected a positive number"),
        ({"keep": moment(inputs(6, 5), "y")}, r"task is in space 'x' and keep in 'y'"),
        ({"task": moment(inputs(6, 5), "g")}, r"task is in space 'g' and keep in 'x'"),
        ({"keep": moment(inputs(5, 5))}, r"keep has shape \(5, 5\) in space 'x'; expected \(6"),
        ({"W": torch.ones(6)}, r"W has shape \(6,\); expected \(m, n\)"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"W": torch.ones(3, 6), "task": moment(inputs(6, 1)), "keep": moment(inputs(6, 5))}
    with pytest.raises(ValueError, match=message):
        contrast_directions(**{**given, "rank": 2, **change})


def test_a_damping_below_the_rounding_of_the_sums_is_refused() -> None:
    keep = moment(inputs(6, 5))
    keep.sum[0, 0] = -keep.sum[0, 0]
    with pytest.raises(ValueError, match="damping=1e-06 is too small"):
        contrast_directions(torch.ones(3, 6), moment(inputs(6, 1)), keep, 2, damping=1e-6)


@pytest.mark.parametrize("condition", [300, 1000])
def test_a_token_far_larger_than_others_leaves_the_large_singular_vectors(
    condition: float, device: torch.device
) -> None:
    """Its rounding in float32, over the squares of the small ones, is larger than the rest."""
    n, m, rank = 160, 96, 8
    sizes = torch.logspace(0, -float(torch.tensor(condition).log10()), m, dtype=F64)
    U, V = (torch.linalg.qr(normal(size, m, seed=seed))[0] for size, seed in ((m, 3), (n, 4)))
    W = ((U * sizes) @ V.T).float()
    x, x0 = inputs(n, 1), inputs(n, 5)
    for rows in (x, x0):
        rows[::64] = 3000 * V[:, 0]
    found = [(v @ W.double().T).float() for v in (x, x0)]
    task, keep = (SecondMoment("y", (y.T @ y).to(device), torch.ones(())) for y in found)
    A = contrast_directions(W.to(device), task, keep, rank)[0]
    A = A.cpu()
    Q = torch.linalg.svd(W.double(), full_matrices=False)[2].T
    torch.testing.assert_close((A @ Q).norm(dim=1), torch.ones(rank, dtype=F64), rtol=0, atol=1e-3)
    # As much of the task, beside what is kept, as in the part of the row space that is known.
    best = 0.0
    for size in range(rank, m + 1):
        best = max(best, float(oracle(x @ Q[:, :size], x0 @ Q[:, :size])[1][:rank].sum()))
    S, S0 = ((v @ Q).T @ (v @ Q) for v in (x, x0))
    S, S0 = S / S.diagonal().mean(), S0 / S0.diagonal().mean() + 1e-2 * torch.eye(m, dtype=F64)
    a = A @ Q
    its = torch.linalg.solve(a @ S0 @ a.T, a @ S @ a.T).trace()
    assert its > 0.5 * best


@pytest.mark.parametrize("condition", [1e3, 1e4, 1e6])
def test_what_w_makes_small_is_rounding_of_its_moments(condition: float) -> None:
    """Sums in float32 of y = Wx know x where singular values of W are above √ε of the largest."""
    n, m, rank = 40, 24, 8
    sizes = torch.logspace(0, -float(torch.tensor(condition).log10()), m, dtype=F64)
    U, V = (torch.linalg.qr(normal(size, m, seed=seed))[0] for size, seed in ((m, 3), (n, 4)))
    W = ((U * sizes) @ V.T).float()
    x, x0 = inputs(n, 1), inputs(n, 5)
    task, keep = (
        SecondMoment(
            "y", sum(p.T @ p for p in (v @ W.double().T).float().split(16)), torch.ones(())
        )
        for v in (x, x0)
    )
    A, found = contrast_directions(W, task, keep, rank)
    Q = torch.linalg.svd(W.double(), full_matrices=False)[2][sizes > 2**-11.5].T
    torch.testing.assert_close((A @ Q).norm(dim=1), torch.ones(rank, dtype=F64), rtol=0, atol=1e-3)
    z = A @ Q
    S, S0 = ((v @ Q).T @ (v @ Q) for v in (x, x0))
    S, S0 = S / S.diagonal().mean(), S0 / S0.diagonal().mean()
    S0 += 0.01 * torch.eye(len(S0), dtype=F64)
    quotients = ((z @ S) * z).sum(1) / ((z @ S0) * z).sum(1)
    # Where W is smallest the rounding of S_y, a float32 sum, is largest: measured 0.0216 at most
    # over the conditions (W cut where its singular values fall below 2^-11.5), and a third more.
    torch.testing.assert_close(found, quotients, rtol=0.03, atol=0)
    assert quotients.sum() > 0.98 * oracle(x @ Q, x0 @ Q)[1][:rank].sum()
