import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from filet_kernels import syrk_

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = torch.finfo(torch.float32).eps


def make(T, n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, n, generator=generator).to(dtype).to(device)


def check(C, X, *, start=None, alpha=1.0, weights=None, steps=1):
    """Lower triangle against float64, elementwise; above the diagonal nothing has moved.

    A float32 sum of T products errs by at most about T u Σ|w x_i x_j| ≤ T u sqrt(G_ii G_jj) with
    u = eps/2; sqrt(T) of that is what random signs leave. The library's float32 product of the
    same operands is the baseline.
    """
    X64 = X.double().reshape(-1, X.shape[-1])
    w64 = torch.ones(X64.shape[0], device=X.device, dtype=torch.float64)
    if weights is not None:
        w64 = weights.double().flatten()
        X64 = X64[w64 != 0]
        w64 = w64[w64 != 0]
    product = alpha * (X64.T * w64) @ X64
    start = torch.zeros_like(product) if start is None else start.double()
    truth = start + steps * product
    X32 = X64.float()
    baseline = (alpha * ((X32.T * w64.float()) @ X32).double() - product).abs()
    diagonal = steps * (X64.square() * w64.abs().unsqueeze(1)).sum(0) * abs(alpha)
    scale = torch.sqrt(diagonal.unsqueeze(0) * diagonal.unsqueeze(1)) + start.abs()
    floor = 4 * EPS * max(X64.shape[0], 1) ** 0.5 * scale + 1e-37
    error = (C.double() - truth).abs()
    bad = torch.tril(error > 2 * steps * baseline + floor)
    assert not bad.any(), (
        f"{int(bad.sum())} elements, first {bad.nonzero()[0].tolist()}: {error[bad][0].item()}"
    )
    above = torch.triu(torch.ones_like(C, dtype=torch.bool), 1)
    assert C[above].isnan().all(), "written above the diagonal"


def poisoned(n, device, value=0.0):
    """A C whose upper triangle is NaN: it must be neither read nor written."""
    C = torch.full((n, n), float("nan"), device=device)
    lower = torch.tril(torch.ones_like(C, dtype=torch.bool))
    return C.masked_fill_(lower, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, n", [(1, 1), (5, 1), (1, 7), (64, 33), (300, 513), (7, 1025)])
def test_shapes(T, n, dtype, device):
    X = make(T, n, dtype, device)
    C = poisoned(n, device)
    assert syrk_(C, X) is C
    check(C, X)


def test_no_rows_leave_C_as_it_is(device):
    C = poisoned(9, device, value=3.0)
    syrk_(C, torch.empty(0, 9, device=device))
    syrk_(C, torch.empty(4, 0, 9, device=device), weights=torch.empty(4, 0, device=device))
    assert (C[torch.tril(torch.ones(9, 9, device=device)) > 0] == 3.0).all()
    syrk_(torch.empty(0, 0, device=device), torch.empty(5, 0, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_onto_C_with_alpha(dtype, device):
    X = make(40, 21, dtype, device)
    C = poisoned(21, device, value=2.5)
    syrk_(C, X, alpha=0.25)
    check(C, X, start=torch.full((21, 21), 2.5, device=device), alpha=0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_weights_and_nan_in_uncounted_rows(dtype, kind, device):
    X = make(50, 19, dtype, device)
    weights = torch.arange(50, device=device) % 3
    weights = {"bool": weights != 0, "int": weights, "float": weights * 0.3}[kind]
    X[weights == 0] = float("nan")
    C = poisoned(19, device)
    syrk_(C, X, weights=weights)
    check(C, X, weights=weights)


def test_mask_of_ones_is_the_unweighted_product_bitwise(device):
    X = make(50, 19, torch.bfloat16, device)
    plain, masked = poisoned(19, device), poisoned(19, device)
    syrk_(plain, X)
    syrk_(masked, X, weights=torch.ones(50, dtype=torch.bool, device=device))
    assert torch.equal(torch.tril(plain.nan_to_num()), torch.tril(masked.nan_to_num()))


@pytest.mark.parametrize("batched", [False, True])
def test_strides(batched, device):
    base = make(60, 70, torch.bfloat16, device)
    X = base[::2, 3:40]
    weights = (torch.arange(30, device=device) % 4 != 0).float()
    if batched:  # not collapsible: sequence-first layout
        X, weights = X.unflatten(0, (10, 3)).transpose(0, 1), weights.view(10, 3).T
    C = poisoned(37, device).T.contiguous().T  # a C of other strides as well
    syrk_(C, X, weights=weights)
    check(C, X, weights=weights)


def test_forty_batches(device):
    X = make(256, 65, torch.bfloat16, device)
    C = poisoned(65, device)
    for _ in range(40):
        syrk_(C, X)
    check(C, X, steps=40)


def test_float64(device):
    X = make(30, 11, torch.float64, device)
    C = torch.zeros(11, 11, dtype=torch.float64, device=device)
    syrk_(C, X)
    torch.testing.assert_close(torch.tril(C), torch.tril(X.T @ X), rtol=1e-14, atol=1e-14)


def test_autocast_does_not_round_the_operands(device):
    X = make(64, 16, torch.float32, device)
    C = poisoned(16, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        syrk_(C, X)
    check(C, X)


def test_compile_traces_through(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(C, X, weights):
        syrk_(C, X * 2, weights=weights)
        return C.diagonal().sum()

    X, weights = make(12, 5, torch.float32, device), torch.ones(12, device=device)
    C = torch.zeros(5, 5, device=device)
    total = step(C, X, weights)
    expected = 4 * X.square().sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(C.trace(), expected)


def test_op_registration(device):
    args = (torch.zeros(5, 5, device=device), make(12, 5, torch.float32, device), 1.0, None)
    torch.library.opcheck(torch.ops.filet_kernels.syrk_, args)


@settings(deadline=None, max_examples=30)
@given(T=st.integers(0, 40), n=st.integers(1, 40), seed=st.integers(0, 9), mask=st.booleans())
def test_random_shapes(T, n, seed, mask):
    X = make(T, n, torch.bfloat16, "cpu", seed)
    weights = torch.arange(T) % (seed + 2) if mask else None
    C = poisoned(n, "cpu")
    syrk_(C, X, weights=weights)
    check(C, X, weights=weights)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"X": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "X is torch.int32"),
        ({"C": torch.zeros(3, 3, dtype=torch.bfloat16)}, TypeError, "C is torch.bfloat16"),
        ({"X": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "float64 C"),
        ({"X": torch.zeros(3)}, ValueError, r"X has shape \(3,\)"),
        ({"C": torch.zeros(4, 4)}, ValueError, r"expected \(3, 3\)"),
        ({"C": torch.zeros(3, 3, device="meta")}, ValueError, "same device"),
        ({"weights": torch.ones(5)}, ValueError, r"weights has shape \(5,\); expected \(4,\)"),
        ({"weights": torch.ones(4, device="meta")}, ValueError, "weights is on meta"),
        ({"weights": torch.ones(4, dtype=torch.cfloat)}, TypeError, "weights is torch.complex64"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"C": torch.zeros(3, 3), "X": torch.zeros(4, 3), "weights": None, **change}
    with pytest.raises(error, match=words):
        syrk_(arguments["C"], arguments["X"], weights=arguments["weights"])
