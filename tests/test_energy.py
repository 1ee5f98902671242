"""The float32 path of fisher_energies, which a GPU takes, on every device; and its products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from filet_kernels import Moments, SecondMoment, energy, fisher_energies
from filet_kernels.product import add_product, column_sums, mirror_, product, split, transposed
from with_triton import needs_triton, skip_interpreter

CUDA = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def batch(shape, T, dtype, device):
    m, n = shape
    generator = torch.Generator().manual_seed(m + n)
    make = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return (
        make(m, n).to(dtype).to(device),
        make(T, n).double().to(device),
        make(T, m).double().to(device),
    )


def moments_of(W, x, g, spaces):
    """Moments in float32 of sums in float64."""
    every = {"x": x, "y": x @ W.double().T, "g": g, "h": g @ W.double()}
    sides = []
    for space in spaces:
        total = torch.tril(every[space].T @ every[space]).float()
        total += torch.triu(torch.full_like(total, float("nan")), 1)
        sides.append(SecondMoment(space, total, torch.tensor(x.shape[0], device=W.device)))
    return Moments(*sides, tuple(W.shape), torch.ones((), dtype=torch.int64, device=W.device))


def energies(W, moments, backend):
    (input_form, squares), (output_form, cubes) = energy._factors_float32(
        W, moments, "accurate", backend
    )
    return input_form / squares * output_form / cubes / moments.input.count**2


@pytest.fixture(params=[1, energy._LEAST], ids=["KW", "forms of W"])
def least(request, monkeypatch):
    """A wide layer is taken as one of many outputs, and as one of few."""
    monkeypatch.setattr(energy, "_LEAST", request.param)
    return request.param


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spaces", ["xg", "xh", "yg", "yh"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33), (1, 9), (9, 1)], ids=str)
def test_every_space(shape, spaces, dtype, device):
    W, x, g = batch(shape, 200, dtype, device)
    truth = oracle.fisher_energies(W, x, g)
    moments = moments_of(W, x, g, spaces)
    found = energies(W, moments, None)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
    chosen = fisher_energies(W, moments)
    torch.testing.assert_close(chosen, found, rtol=1e-12 if device.type == "cuda" else 1e-5, atol=0)


@needs_triton
@pytest.mark.parametrize("spaces", ["xg", "yg", "xh"])
@pytest.mark.parametrize("shape", [(60, 140), (140, 60)], ids=str)
def test_with_the_kernel_and_in_parts(shape, spaces, device, monkeypatch):
    skip_interpreter(device)
    monkeypatch.setattr(energy, "_ROWS_A_SUM", 50)
    W, x, g = batch(shape, 300, torch.bfloat16, device)
    found = energies(W, moments_of(W, x, g, spaces), "triton")
    torch.testing.assert_close(found, oracle.fisher_energies(W, x, g), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("shape", [(300, 1300), (1300, 300)], ids=str)
def test_larger_than_one_part(shape, device):
    W, x, g = batch(shape, 400, torch.bfloat16, device)
    for spaces in ("xg", "yh"):
        found = energies(W, moments_of(W, x, g, spaces), None)
        torch.testing.assert_close(found, oracle.fisher_energies(W, x, g), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("spaces", ["xg", "xh", "yg", "yh"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33)], ids=str)
def test_columns_apart(shape, spaces, device):
    """Of some candidates alone, as processes divide them: what they have among all."""
    W, x, g = batch(shape, 200, torch.float32, device)
    moments = moments_of(W, x, g, spaces)
    parts = [slice(0, 7), slice(7, 8), slice(8, shape[1])]
    close = {"rtol": 1e-6 if device.type == "cuda" else 1e-12, "atol": 0}
    apart = [fisher_energies(W, moments, columns=columns) for columns in parts]
    assert [len(part) for part in apart] == [7, 1, shape[1] - 8]
    torch.testing.assert_close(torch.cat(apart), fisher_energies(W, moments), **close)
    whole = energy._factors_float32(W, moments, "accurate")
    for columns in parts:
        part = energy._factors_float32(W, moments, "accurate", columns=columns)
        for side, its in zip(whole, part, strict=True):
            for found, one in zip(side, its, strict=True):
                torch.testing.assert_close(one, found[columns], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spaces", ["xg", "yg", "xh", "yh"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_no_matrix_of_the_larger_space_is_made(shape, spaces, device, monkeypatch):
    monkeypatch.setattr(energy, "_LEAST", 1)
    W, x, g = batch(shape, 200, torch.bfloat16, device)
    moments = moments_of(W, x, g, spaces)

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            self.shapes += [t.shape for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            return made

    for run in (fisher_energies, lambda W, moments: energies(W, moments, None)):
        with Made() as seen:
            run(W, moments)
        assert seen.shapes and (max(shape),) * 2 not in seen.shapes


@pytest.mark.skipif(not CUDA, reason="it needs a CUDA device: allocations are counted there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape, spaces",
    [
        ((4096, 4096), "xg"),
        ((6000, 4096), "xh"),
        ((4096, 11000), "yg"),
        ((4224, 12000), "yg"),
        ((1024, 4096), "xg"),  # k and v, whose x is q's
        ((1024, 8192), "xg"),
        ((1025, 5001), "xg"),
        ((2048, 2048), "xg"),
        ((1024, 9000), "yg"),
        ((5000, 1100), "xh"),
    ],
    ids=str,
)
def test_no_temporary_is_larger_than_the_smaller_moment(shape, spaces, dtype):
    W, x, g = batch(shape, 64, dtype, torch.device("cuda", 0))
    moments = moments_of(W, x, g, spaces)
    fisher_energies(W, moments)  # the libraries' workspaces, which stay
    history = torch.cuda.memory._record_memory_history
    events = lambda: torch.cuda.memory._snapshot()["device_traces"][W.device.index]  # noqa: E731
    history(stacks="python")
    try:
        before = len(events())
        fisher_energies(W, moments)
        sizes = [event["size"] for event in events()[before:] if event["action"] == "alloc"]
    finally:
        history(enabled=None)
    assert max(sizes) <= min(shape) ** 2 * 4


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_columns_of_any_size(shape, device, least):
    """One column 1e-9 of the rest, one 100 times it; a zero column has no energy."""
    W, x, g = batch(shape, 200, torch.float32, device)
    W[:, 3] *= 1e-9
    W[:, 5] *= 100
    x[:, 5] /= 100
    W[:, 7] = 0
    truth = oracle.fisher_energies(W, x, g)
    assert truth.isnan().nonzero().tolist() == [[7]]
    for spaces in ("xg", "yh"):
        found = energies(W, moments_of(W, x, g, spaces), None)
        # What the large column adds cancels among the elements of W S Wᵀ and of K S K, in float32.
        cancels = shape == (24, 40) and (spaces == "yh" or least > 1)
        rtol = 5e-3 if cancels else 1e-4
        torch.testing.assert_close(found, truth, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("outlier, bound", [(30, 1e-5), (100, 1e-4), (1000, 1e-2)])
def test_an_outlier_of_x_in_a_wide_layer(outlier, bound, device):
    """One channel so many times the others, and columns of W orthogonal to that channel's."""
    W, x, g = batch((150, 400), 600, torch.float32, device)
    x[:, 3] *= outlier
    unit = W[:, 3].double() / W[:, 3].double().norm()
    W[:, 200:] -= (unit[:, None] * (unit @ W[:, 200:].double())).float()
    truth = oracle.fisher_energies(W, x, g)
    found = energies(W, moments_of(W, x, g, "xg"), None)
    error = ((found - truth) / truth).abs().max()
    assert error <= bound, f"{error:.1e}"
    in_float64 = fisher_energies(W.double(), moments_of(W, x, g, "xg"))
    torch.testing.assert_close(in_float64, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("a_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b_dtype", DTYPES, ids=str)
def test_products_have_float32s_precision(a_dtype, b_dtype, device):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(50, 3000, generator=generator)
    B = torch.randn(3000, 20, generator=generator)
    for scale in (1.0, 1e-3, 1e3, 1e-20, 1e20):
        wide = torch.float16 not in (a_dtype, b_dtype)
        if not wide and scale not in (1.0, 1e-3):
            continue
        a, b = (scale * A).to(a_dtype).to(device), (scale * B).to(b_dtype).to(device)
        b = b * torch.tensor([1.0, 2.0**-9] * 10, device=device, dtype=b_dtype)
        C, factors = product(split(a), split(b, columns=True))
        assert C.dtype == torch.float32 and C.isfinite().all()
        a, b = a.double(), b.double()
        error = (C.double() / factors - a @ b).abs() / (a.abs() @ b.abs())
        assert error.max() <= 2.0**-22, f"{scale}: {error.max():.1e}"


def test_the_first_product_overwrites(device):
    C = torch.full((4, 3), float("nan"), device=device)
    A, B = torch.ones(4, 8, device=device).half(), torch.ones(8, 3, device=device).half()
    add_product(C, A, B, 0.5, anew=True)
    assert (C == 4).all()
    add_product(C, A, B, 0.25, anew=False)
    assert (C == 6).all()
    empty = torch.zeros(4, 0, device=device), torch.zeros(0, 3, device=device)
    C, scale = product(split(empty[0]), split(empty[1], columns=True))
    assert C.shape == (4, 3) and not C.any() and scale.shape == (3,)


def test_products_are_not_cast_by_autocast(device):
    A, B = torch.rand(8, 8, device=device), torch.rand(8, 3, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        C, scale = product(split(A), split(B, columns=True))
    torch.testing.assert_close(C.double() / scale, A.double() @ B.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parts_add_up(dtype, device):
    x = torch.logspace(-4, 4, 60).reshape(6, 10).to(dtype).to(device)
    x[2, 3] = 0
    for columns in (False, True):
        parts, scale = (s := split(x, columns=columns)).parts, s.scale
        assert len(parts) == (2 if dtype == torch.float32 else 1)
        total = sum(part.double() * 2.0 ** (-11 * i) for i, part in enumerate(parts)) / scale
        torch.testing.assert_close(total, x.double(), rtol=2.0**-23, atol=0)
        assert all(part.isfinite().all() for part in parts)
        assert (torch.frexp(scale).mantissa == 0.5).all()  # powers of two
    zeros = split(torch.zeros(3, 2, dtype=dtype, device=device), columns=True)
    assert (zeros.parts[0] == 0).all() and zeros.scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 300), (600, 33), (1000, 1024)])
def test_column_sums(rows, columns, dtype, device):
    generator = torch.Generator().manual_seed(rows)
    V = torch.randn(rows, columns, generator=generator).to(device)
    W = torch.randn(2 * columns, rows, generator=generator).to(dtype).to(device).T[:, 1::2]
    squares, products = column_sums(V, W)
    exact, size = V.double() * W.double(), (V.double() * W.double()).abs().sum(0)
    torch.testing.assert_close(squares, V.double().square().sum(0), rtol=1e-5, atol=0)
    assert ((products - exact.sum(0)).abs() <= 1e-5 * size).all()
    assert torch.equal(column_sums(V)[0], squares)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1500])
def test_mirror(n, device):
    wide = torch.randn(n, n + 3, device=device)
    C = wide[:, :n]
    expected, beside = torch.tril(C) + torch.tril(C, -1).T, wide[:, n:].clone()
    assert mirror_(C) is C
    assert torch.equal(C, expected) and torch.equal(wide[:, n:], beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (64, 64), (0, 5), (257, 3)], ids=str)
def test_transposed(shape, dtype, device):
    wide = torch.randn(shape[0], 2 * shape[1] + 3, device=device).to(dtype)
    for X in (wide[:, 1 : 1 + shape[1]], wide[:, : 2 * shape[1] : 2]):  # strided rows, and columns
        copy = transposed(X)
        assert copy.is_contiguous() and torch.equal(copy, X.T)
