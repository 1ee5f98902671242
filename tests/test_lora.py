import subprocess
import sys

import pytest
import torch

import oracle
from filet_kernels import lora, lora_factors, residual_weight, residual_weight_, select

NAN = float("nan")


def test_select_min_max_with_ties_by_index(device):
    energies = torch.tensor([3.0, 1.0, NAN, 1.0, 0.0, 3.0], device=device)
    assert select(energies, 3).tolist() == [4, 1, 3]
    assert select(energies, 5).tolist() == [4, 1, 3, 0, 5]
    assert select(energies, 3, "max").tolist() == [0, 5, 1]


def test_select_takes_infinities_and_nothing_else_that_is_no_number(device):
    inf = float("inf")
    energies = torch.tensor([inf, NAN, 2.0, -0.0, NAN, 0.0], device=device)
    assert select(energies, 4).tolist() == [3, 5, 2, 0]
    assert select(energies, 4, "max").tolist() == [0, 2, 3, 5]
    for how in ("min", "max", "random"):
        with pytest.raises(ValueError, match="rank=5 exceeds the 4 candidate directions"):
            select(energies, 5, how)
        with pytest.raises(ValueError, match="rank=9 exceeds the 4 candidate directions"):
            select(energies, 9, how)


def test_select_is_a_stable_sort(device):
    generator = torch.Generator().manual_seed(0)
    energies = torch.randint(40, (3000,), generator=generator).double().to(device)
    energies[::7] = NAN
    candidates = [i for i in range(3000) if i % 7]
    values = energies.tolist()
    ordered = sorted(candidates, key=lambda i: values[i])
    assert select(energies, 100).tolist() == ordered[:100]
    ordered = sorted(candidates, key=lambda i: -values[i])
    assert select(energies, 100, "max").tolist() == ordered[:100]


def test_select_random_is_seeded_uniform_and_skips_non_candidates(device):
    energies = torch.rand(50, device=device, dtype=torch.float64)
    energies[::5] = NAN
    first = select(energies, 10, "random", seed=3)
    assert torch.equal(first, select(energies, 10, "random", seed=3))
    assert not torch.equal(first, select(energies, 10, "random", seed=4))
    assert len(set(first.tolist())) == 10 and not energies[first].isnan().any()
    drawn = {i for s in range(200) for i in select(energies, 4, "random", seed=s).tolist()}
    assert drawn == {i for i in range(50) if i % 5}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.tensor([1.0, NAN, 2.0]), 3), r"rank=3 exceeds the 2 candidate directions"),
        ((torch.ones(3), 0), "rank=0"),
        ((torch.ones(3), 1, "best"), "how='best'"),
        ((torch.ones(3, 1), 1), r"shape \(3, 1\)"),
    ],
)
def test_select_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        select(*arguments)


@pytest.fixture
def layer(device):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 30, generator=generator, dtype=torch.float64).to(device)
    energies = torch.rand(30, generator=generator, dtype=torch.float64).to(device)
    return W, energies


def test_fisher_factors_equal_algorithm_1(layer):
    W, energies = layer
    A, B = lora_factors(W, energies, select(energies, 6), dtype=torch.float64)
    A0, B0, W_res = oracle.factors(W, energies, 6, 0.7)
    torch.testing.assert_close(A, A0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(B, B0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(residual_weight(W, A, B, 0.7), W_res, rtol=1e-12, atol=1e-14)


def test_scalings(layer):
    W, energies = layer
    indices = select(energies, 6)
    V = oracle.normalize_columns(W.T @ W)[:, indices]

    def norms(scaling):
        A, B = lora_factors(W, energies, indices, scaling=scaling, dtype=torch.float64)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
        return A, B, A.norm(dim=1) ** 2

    A, B, c = norms("singular")
    torch.testing.assert_close(c, (W @ V).norm(dim=0))
    torch.testing.assert_close(B @ A, W @ V @ V.T)
    torch.testing.assert_close(norms("fisher")[2], energies[indices])
    torch.testing.assert_close(norms("constant_min")[2], energies[indices].min().expand(6))
    torch.testing.assert_close(norms("constant_max")[2], energies[indices].max().expand(6))


@pytest.mark.parametrize("scaling", ["fisher", "singular", "constant_min", "constant_max"])
@pytest.mark.parametrize("gamma", [1 / 3, 2.0])
def test_gamma_sets_the_magnitude_and_keeps_the_proportions(layer, scaling, gamma):
    W, energies = layer
    indices = select(energies, 6)
    plain_A, plain_B = lora_factors(W, energies, indices, scaling=scaling, dtype=torch.float64)
    c = plain_A.square().sum(1)
    root = (gamma / c.mean()).sqrt()
    how = {"scaling": scaling, "gamma": gamma, "dtype": torch.float64}
    for unit in (1.0, 1e-30, 1e30):
        A, B = lora_factors(W, energies * unit, indices, **how)
        torch.testing.assert_close(A, plain_A * root, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(B, plain_B * root, rtol=1e-12, atol=1e-14)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored, _ = lora_factors(W, energies * 1e-30, indices, scaling=scaling, gamma=gamma)
        torch.testing.assert_close(stored.double(), plain_A * root, rtol=1e-5, atol=1e-6)
        rounded, _ = lora_factors(W, energies, indices, scaling=scaling, gamma=gamma, dtype=dtype)
        assert torch.equal(rounded.float(), stored.to(dtype).float())


@pytest.mark.parametrize("scaling", ["fisher", "singular", "constant_max"])
@pytest.mark.parametrize("how", ["min", "max", "random"])
def test_orthogonal_takes_q_for_the_directions(layer, scaling, how):
    W, energies = layer
    indices = select(energies, 6, how)
    A, B = lora_factors(W, energies, indices, scaling=scaling, orthogonal=True, dtype=torch.float64)
    Q, R = torch.linalg.qr(oracle.normalize_columns(W.T @ W)[:, indices])
    Q = Q * R.diagonal().sign()
    sizes = {"fisher": energies[indices], "singular": (W @ Q).norm(dim=0)}
    c = sizes.get(scaling, energies[indices].max().expand(6))
    torch.testing.assert_close(A, c.sqrt().unsqueeze(1) * Q.T)
    torch.testing.assert_close(B, oracle.normalize_columns(W @ Q) * c.sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [40, 3000])
def test_orthogonal_of_directions_that_are_nearly_or_all_the_same(device, dtype, n):
    """Columns of W that are parallel have one direction. No row of theirs is zero, or no number."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, n, generator=generator).to(dtype)
    W[:, 1], W[:, 2], W[:, 3] = W[:, 0], 2 * W[:, 0], W[:, 0] + 1e-2 * W[:, 5]
    W = W.to(device)
    energies = torch.ones(n, dtype=torch.float64, device=device)
    indices = torch.tensor([7, 0, 3, 4, 1, 2], device=device)
    A, B = lora_factors(W, energies, indices, orthogonal=True, dtype=torch.float64)
    assert A.isfinite().all() and B.isfinite().all()
    torch.testing.assert_close(A.norm(dim=1), torch.ones(6).to(A), rtol=0, atol=1e-6)
    Q, R = torch.linalg.qr(oracle.normalize_columns(W.double().T @ W.double())[:, indices[:4]])
    loose = 1e-4 if device.type == "cuda" and dtype != torch.float64 else 1e-9  # a difference's
    torch.testing.assert_close(A[:4], (Q * R.diagonal().sign()).T, rtol=0, atol=loose)
    torch.testing.assert_close(A[:4] @ A[:4].T, torch.eye(4).to(A), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", ["fisher", "singular"])
@pytest.mark.parametrize("gamma", [None, 1 / 3])
def test_orthogonal_beyond_the_rank_of_w(device, scaling, gamma):
    """The paper's start subtracts B A from W: one number that is none would be all of the model."""
    energies, indices = torch.ones(8, dtype=torch.float64), torch.arange(8)
    how = {"scaling": scaling, "gamma": gamma, "orthogonal": True}
    for seed in range(20):
        W = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        A, B = lora_factors(W, energies.to(device), indices, **how)
        assert A.isfinite().all() and B.isfinite().all()
        # The first direction is W's only one.
        torch.testing.assert_close(A[0] / A[0].norm(), W[0] * W[0, 0].sign() / W.norm())
    # Products of integers: what is nothing is exactly that.
    for W in (torch.ones(4, 8, device=device), torch.eye(4, device=device).repeat(1, 2)):
        assert all(x.isfinite().all() for x in lora_factors(W, energies.to(device), indices, **how))


def test_no_row_is_zero_with_gamma(layer):
    """Where energies are 0, or nearly so beside the others."""
    W, energies = layer
    indices = torch.arange(6, device=W.device)

    def c(values, **how):
        energies[:6] = torch.tensor(values, dtype=torch.float64)
        A, B = lora_factors(W, energies, indices, dtype=torch.float64, **how)
        torch.testing.assert_close(A.square().sum(1), B.square().sum(0))
        return A.square().sum(1)

    def close(found, expected):
        torch.testing.assert_close(found.cpu(), torch.tensor(expected, dtype=torch.float64))

    close(c([0, 1e-9, 1, 2, 3, 6], gamma=0.5), [5e-5, 5e-5, 0.25, 0.5, 0.75, 1.5])
    close(c([0, 0, 0, 0, 0, 0], gamma=0.5), [0.5] * 6)
    for scaling in ("constant_min", "constant_max"):
        close(c([0, 1, 1, 2, 3, 6], gamma=0.5, scaling=scaling), [0.5] * 6)
    close(c([0, 0, 1, 2, 3, 6]), [0.0, 0.0, 1.0, 2.0, 3.0, 6.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scaling", ["fisher", "singular"])
@pytest.mark.parametrize("m, n", [(3000, 400), (400, 3000)])
def test_float32_products_give_the_factors_of_float64(m, n, scaling, dtype, device):
    """What a GPU does, on every device. Columns of any size: their squares underflow in float32."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator)
    W[:, 3] *= 1e-4 if dtype == torch.float16 else 1e-25
    W = W.to(dtype).to(device)
    indices = torch.tensor([3, 0, 7, n - 1], device=device)
    root = torch.tensor([1e-9, 1.0, 2.0, 1e9], dtype=torch.float64, device=device)
    root = root if scaling == "fisher" else None
    A, B = lora._factors(W, indices, root, torch.float32, torch.float32)
    truth = lora._factors(W, indices, root, torch.float64, torch.float64)
    # On a CPU up to 7e-7 of a row's or column's norm.
    for factor, exact, dim in ((A, truth[0], 1), (B, truth[1], 0)):
        assert factor.dtype == torch.float32 and factor.is_contiguous()
        error = (factor.double() - exact).norm(dim=dim) / exact.norm(dim=dim)
        assert error.max() < 5e-6, error
    if device.type == "cuda" and scaling == "fisher":
        chosen = lora_factors(W, root.new_zeros(n).index_put((indices,), root**2), indices)
        torch.testing.assert_close(chosen, (A, B), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m, n", [(1, 5), (5, 1), (1, 1)])
def test_one_row_and_one_column(m, n, device):
    W = torch.full((m, n), 2.0, device=device)
    A, B = lora_factors(W, torch.ones(n, device=device), torch.tensor([0], device=device))
    assert A.shape == (1, n) and B.shape == (m, 1) and A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(B @ A, torch.ones(m, n, device=device) / (m * n) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_residual_is_rounded_once_from_the_stored_factors(layer, dtype, stored):
    W, energies = layer
    W = W.to(dtype)
    A, B = lora_factors(W, energies, select(energies, 6), dtype=stored)
    residual = residual_weight(W, A, B, 1.5)
    assert residual.dtype == dtype and A.dtype == B.dtype == stored
    exact = W.double() - 1.5 * B.double() @ A.double()
    eps = torch.finfo(dtype).eps
    # Half a unit in the last place for the rounding, and the float32 arithmetic before it.
    bound = 0.5001 * eps * exact.abs() + 1e-6 * exact.abs().max()
    assert ((residual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_residual_in_place(layer, dtype, transposed):
    W, energies = layer
    A, B = lora_factors(W, energies, select(energies, 6))
    W = W.to(dtype)
    before, beside = W.clone(), torch.zeros(64, 64, dtype=dtype, device=W.device)
    part = (beside.T if transposed else beside)[5:25, 7:37]
    part.copy_(W)
    error = residual_weight_(part, A, B, 1.5)
    assert torch.equal(part, residual_weight(before, A, B, 1.5))
    part.zero_()
    assert not beside.any()  # nothing else was written
    residual = residual_weight(before, A, B, 1.5).double()
    exact = (residual + 1.5 * B.double() @ A.double() - before.double()).abs().max()
    # For 16 bits it is found in float32, to 2⁻²⁴ of numbers that are rounded by 2⁻⁹ or 2⁻¹².
    # float64 cannot see its own rounding.
    torch.testing.assert_close(error.double(), exact, rtol=1e-3, atol=1e-14)


def test_autocast_stays_out(layer):
    W, energies = layer
    W = W.bfloat16()
    A, B = lora_factors(W, energies, select(energies, 6))
    expected = residual_weight(W, A, B, 1.5)
    with torch.autocast(W.device.type, dtype=torch.bfloat16):
        found = lora_factors(W, energies, select(energies, 6))
        assert torch.equal(found[0], A) and torch.equal(found[1], B)
        assert torch.equal(residual_weight(W, A, B, 1.5), expected)
        indices = torch.tensor([0, 3], device=W.device)
        products = lora._factors(W, indices, None, torch.float32, torch.float32)
    for x, y in zip(
        products, lora._factors(W, indices, None, torch.float64, torch.float32), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_strided_weight_is_taken_as_it_is(layer):
    W, energies = layer
    transposed = W.T.contiguous().T
    indices = select(energies, 4)
    for one, other in zip(
        lora_factors(W, energies, indices), lora_factors(transposed, energies, indices), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_bad_input_is_named(layer):
    W, energies = layer
    indices = select(energies, 4)
    with pytest.raises(ValueError, match=r"energies has shape \(5,\)"):
        lora_factors(W, energies[:5], indices)
    with pytest.raises(ValueError, match="indices has shape"):
        lora_factors(W, energies, indices[:0])
    with pytest.raises(ValueError, match="scaling='none'"):
        lora_factors(W, energies, indices, scaling="none")
    for gamma in (0.0, -1.0, float("inf"), NAN):
        with pytest.raises(ValueError, match=f"gamma={gamma}; expected a positive number, or None"):
            lora_factors(W, energies, indices, gamma=gamma)
    energies[indices[0]] = NAN
    with pytest.raises(ValueError, match="zero column"):
        lora_factors(W, energies, indices)
    with pytest.raises(ValueError, match=r"expected \(r, 30\) and \(20, r\)"):
        residual_weight(W, torch.zeros(4, 30), torch.zeros(20, 5), 1.0)


# In a process of its own: torch does not forget which way of allowing TF32 was used.
ALLOWED = """
import torch
from filet_kernels import residual_weight
matmul, addmm, seen = torch.backends.cuda.matmul, torch.addmm, []
def watched(*args, **kwargs):
    seen.append(matmul.allow_tf32)
    return addmm(*args, **kwargs)
torch.addmm = watched
{allow}
before = {state}
residual_weight(torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), 1.0)
assert seen == [False], seen
assert {state} == before, ({state}, before)
"""


@pytest.mark.parametrize(
    ("allow", "state"),
    [
        ("", "matmul.allow_tf32"),
        ("torch.set_float32_matmul_precision('high')", "torch.get_float32_matmul_precision()"),
        ("matmul.allow_tf32 = True", "matmul.allow_tf32"),
        ("matmul.fp32_precision = 'tf32'", "matmul.fp32_precision"),
    ],
)
def test_tf32_stays_out(allow, state):
    if "fp32_precision" in allow and torch.__version__ < "2.9":
        pytest.skip("torch has had it since 2.9")
    script = ALLOWED.format(allow=allow, state=state)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
