"""W S Wᵀ from the lower triangle of S, by every implementation."""

import pytest
import torch

from filet_kernels.congruence import congruence
from with_triton import needs_triton, skip_interpreter


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request, device):
    """Each implementation that runs on the device; Triton's is interpreted on a CPU."""
    if request.param == "triton":
        skip_interpreter(device)
    return request.param


def operands(m, n, dtype, device):
    generator = torch.Generator().manual_seed(m + n)
    W = torch.randn(m, n, generator=generator).to(dtype).to(device)
    X = torch.randn(2 * n, n, generator=generator).double().to(device)
    X[:, ::7] *= 30
    full = (X.T @ X).float()
    S = torch.tril(full) + torch.triu(torch.full_like(full, float("nan")), 1)
    full = (torch.tril(full) + torch.tril(full, -1).T).double()
    return W, S, full


def check(found, W, full):
    W = W.double()
    size = W.abs() @ full.abs() @ W.abs().T
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    assert ((found - W @ full @ W.T).abs() <= 5e-7 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "m, n, rows", [(1, 1, 1), (3, 70, 70), (40, 200, 64), (70, 150, 41), (33, 100, 7), (5, 0, 3)]
)
def test_congruence(m, n, rows, dtype, backend, device):
    W, S, full = operands(m, n, dtype, device)
    check(congruence(W, S, rows, backend), W, full)


def test_strides(backend, device):
    W, S, _ = operands(40, 90, torch.bfloat16, device)
    expected = congruence(W, S, 32, backend)
    wide = torch.full((90, 80), float("nan"), dtype=W.dtype, device=device)
    wide[:, ::2] = W.T
    larger = torch.full((90, 200), float("nan"), device=device)
    larger[:, 1:181:2] = S
    found = congruence(wide[:, ::2].T, larger[:, 1:181:2], 32, backend)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max())


def test_float64(device):
    W, S, full = operands(20, 60, torch.float64, device)
    for moment in (S.double(), S):
        found = congruence(W, moment, 16)
        assert found.dtype == torch.float64
        # Elements of W S Wᵀ are down to 1e-3 of the sums that they come from: 1.4e-13 of them here.
        torch.testing.assert_close(found, W @ full @ W.T, rtol=1e-11, atol=0)


def test_not_in_tf32(device):
    if device.type == "cpu":
        pytest.skip("TF32 is a GPU's")
    W, S, full = operands(60, 300, torch.float32, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = congruence(W, S, 128, "reference")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    check(found, W, full)
