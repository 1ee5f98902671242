"""Times of the backend's operations on this machine, each checked against float64 first.

    make bench

The operands are those of one layer (n = m) and one batch of tokens; on a machine without a GPU the
shapes are small. TFLOP/s count the operations of the full product, whatever a kernel skips.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from filet_kernels import Moments, cross_entropy_, fisher_energies, quadform_diag, syrk_

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1024, 2048, 4096, 8192] if CUDA else [256, 1024]
TOKENS = 4096 if CUDA else 512
VOCABULARY = 128256 if CUDA else 8192


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


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(TOKENS, VOCABULARY, device=DEVICE, dtype=torch.bfloat16).mul_(3)
    return logits, torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)


def measure_bytes(benchmark: Any, run: Any) -> None:
    """GB/s count what cannot be avoided without a cache: logits read twice and written once."""
    measure(benchmark, run, 0)
    del benchmark.extra_info["TFLOP/s"]
    median = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(6 * TOKENS * VOCABULARY / median / 1e9, 1)


@pytest.mark.benchmark(group="cross-entropy")
def test_cross_entropy(benchmark: Any) -> None:
    """Losses and gradient; the rounds after the first take the last one's gradient for logits."""
    logits, labels = logits_and_labels()
    few = logits[:8].double().requires_grad_()
    truth = F.cross_entropy(few, labels[:8], reduction="none")
    truth.sum().backward()
    losses = cross_entropy_(logits, labels)
    assert (losses[:8] - truth).abs().max() <= 1e-5
    assert few.grad is not None
    assert ((logits[:8] - few.grad).abs() <= 2**-8 * few.grad.abs() + 1e-6).all()
    measure_bytes(benchmark, lambda: cross_entropy_(logits, labels))


@pytest.mark.benchmark(group="cross-entropy")
def test_cross_entropy_of_the_library(benchmark: Any) -> None:
    """What it replaces: transformers' loss of the same bfloat16 logits, forward and backward."""
    logits, labels = logits_and_labels()
    logits.requires_grad_()

    def run() -> None:
        logits.grad = None
        F.cross_entropy(logits.float(), labels, reduction="sum").backward()

    measure_bytes(benchmark, run)
