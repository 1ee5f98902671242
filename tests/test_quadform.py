import pytest
import torch

from filet_kernels import quadform_diag


def make(n, p, device, s_dtype=torch.float32, v_dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1000 + p)
    X = torch.randn(n + 5, n, generator=generator, dtype=torch.float64)
    S = (X.T @ X).to(s_dtype).to(device)
    V = torch.randn(n, p, generator=generator).to(v_dtype).to(device)
    symmetric = torch.tril(S) + torch.tril(S, -1).T
    truth = (V.double() * (symmetric.double() @ V.double())).sum(0)
    magnitude = (V.double().abs() * (symmetric.double().abs() @ V.double().abs())).sum(0)
    S = S.masked_fill(torch.triu(torch.ones_like(S), 1) > 0, float("nan"))  # never read
    return S, V, truth, magnitude


@pytest.mark.parametrize("v_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n, p", [(1, 1), (1, 6), (7, 1), (40, 33), (513, 5), (1030, 20)])
def test_accurate(n, p, v_dtype, device):
    S, V, truth, magnitude = make(n, p, device, v_dtype=v_dtype)
    result = quadform_diag(S, V)
    assert result.shape == (p,) and result.dtype == torch.float64
    assert ((result - truth).abs() <= 1e-14 * n * magnitude).all()


@pytest.mark.parametrize("n, p", [(7, 3), (600, 20)])
def test_fast_is_within_its_bound_and_not_the_accurate_one(n, p, device):
    S, V, truth, magnitude = make(n, p, device)
    error = (quadform_diag(S, V, precision="fast") - truth).abs()
    # Three operands rounded to bfloat16 (unit roundoff 2⁻⁹), and float32 sums.
    assert (error <= (3 * 2.0**-9 + n * 2.0**-24) * magnitude).all()
    assert error.max() > 1e-9 * magnitude.max()


def test_cancellation_is_kept(device):
    """One channel 1000 times the rest and directions orthogonal to it: what FILet looks for."""
    S, V, _, _ = make(64, 8, device)
    S[0, 0] = 1e6
    V[0] = 0
    symmetric = torch.tril(S) + torch.tril(S, -1).T
    truth = (V.double() * (symmetric.double() @ V.double())).sum(0)
    torch.testing.assert_close(quadform_diag(S, V), truth, rtol=1e-12, atol=0)


def test_strides_and_empty(device):
    S, V, truth, _ = make(30, 12, device)
    wide = torch.zeros(60, 24, device=device)
    wide[::2, ::2] = V
    torch.testing.assert_close(quadform_diag(S.T.contiguous().T, wide[::2, ::2]), truth)
    assert quadform_diag(S, V[:, :0]).shape == (0,)
    zero = quadform_diag(torch.empty(0, 0, device=device), torch.empty(0, 4, device=device))
    assert torch.equal(zero.cpu(), torch.zeros(4, dtype=torch.float64))


def test_autocast_does_not_round_the_operands(device):
    S, V, truth, magnitude = make(40, 9, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        result = quadform_diag(S, V)
    assert ((result - truth).abs() <= 1e-12 * magnitude).all()


def test_compile_traces_through_and_registration(device):
    S, V, truth, _ = make(30, 12, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(S, V):
        return quadform_diag(S, V).sum()

    torch.testing.assert_close(total(S, V), truth.sum())
    torch.library.opcheck(torch.ops.filet_kernels.quadform_diag, (S, V, "accurate"))


@pytest.mark.parametrize(
    "S, V, precision, error, words",
    [
        (torch.eye(3).half(), torch.ones(3, 2), "accurate", TypeError, "S is torch.float16"),
        (torch.eye(3), torch.ones(3, 2).int(), "accurate", TypeError, "V is torch.int32"),
        (torch.ones(3, 4), torch.ones(3, 2), "accurate", ValueError, "square"),
        (torch.eye(3), torch.ones(4, 2), "accurate", ValueError, r"expected \(3, p\)"),
        (torch.eye(3), torch.ones(3, 2, device="meta"), "fast", ValueError, "same device"),
        (torch.eye(3), torch.ones(3, 2), "exact", ValueError, "precision='exact'"),
    ],
)
def test_bad_input_is_named(S, V, precision, error, words):
    with pytest.raises(error, match=words):
        quadform_diag(S, V, precision=precision)
