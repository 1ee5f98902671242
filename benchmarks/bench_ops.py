"""Times of the backend's operations on this machine, each checked against float64 first.

    make bench

The operands are those of one layer (n = m) and one batch of tokens; on a machine without a GPU the
shapes are small. TFLOP/s count the operations of the full product, whatever a kernel skips.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from filet_kernels import Moments, fisher_energies, quadform_diag, syrk_

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1024, 2048, 4096, 8192] if CUDA else [256, 1024]
TOKENS = 4096 if CUDA else 512


def measure(benchmark: Any, run: Any, operations: float) -> None:
    """The operation's time, with the device idle before and after."""

    def once() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "CPU"
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.pedantic(once, rounds=10, warmup_rounds=2)
    benchmark.extra_info["TFLOP/s"] = round(operations / benchmark.stats.stats.median / 1e12, 3)


def operands(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(TOKENS, n, device=DEVICE).bfloat16()
    return X, torch.zeros(n, n, device=DEVICE)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.benchmark(group="syrk")
def test_syrk(benchmark: Any, n: int) -> None:
    X, C = operands(n)
    syrk_(C, X)
    columns = X[:, :8].double()
    error = (C[:, :8].double() - X.double().T @ columns).tril().abs().max()
    assert error <= 1e-5 * TOKENS
    measure(benchmark, lambda: syrk_(C, X), 2 * TOKENS * n**2)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.benchmark(group="syrk")
def test_product_of_the_library(benchmark: Any, n: int) -> None:
    """What syrk_ is measured against: the full product, added to C."""
    X, C = operands(n)
    if CUDA:
        run = lambda: C.add_(torch.mm(X.T, X, out_dtype=torch.float32))  # noqa: E731
    else:
        run = lambda: C.addmm_(X.T.float(), X.float())  # noqa: E731
    measure(benchmark, run, 2 * TOKENS * n**2)


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.benchmark(group="quadform")
def test_quadform(benchmark: Any, n: int, precision: Any) -> None:
    X, S = operands(n)
    syrk_(S, X)
    V = torch.randn(n, n, device=DEVICE)
    full = (S.tril() + S.tril(-1).T).double()
    truth = (V[:, :8].double() * (full @ V[:, :8].double())).sum(0)
    error = (quadform_diag(S, V, precision=precision)[:8] - truth).abs() / truth
    assert error.max() <= (1e-10 if precision == "accurate" else 5e-2)
    measure(benchmark, lambda: quadform_diag(S, V, precision=precision), 2 * n**3)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.benchmark(group="energies")
def test_fisher_energies(benchmark: Any, n: int) -> None:
    """A whole layer, accurate: two Gram products, two quadratic forms."""
    X, _ = operands(n)
    W = torch.randn(n, n, device=DEVICE).bfloat16()
    moments = Moments.zeros((n, n), device=DEVICE)
    moments.update(x=X, loss_terms=1)
    moments.update(g=X)
    assert (fisher_energies(W, moments) > 0).all()
    measure(benchmark, lambda: fisher_energies(W, moments), 8 * n**3)
