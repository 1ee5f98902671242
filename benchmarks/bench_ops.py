"""Times of the backend's operations on this machine, each checked against float64 first.

    make bench

The operands are those of one layer (n = m) and one batch of tokens; on a machine without a GPU the
shapes are small. TFLOP/s count the operations of the full product, whatever a kernel skips.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from bench_syrk import library
from filet_kernels import Moments, cross_entropy_, fisher_energies, quadform_diag, syrk_
from filet_kernels.elementwise.rms_norm import rms_norm
from filet_kernels.elementwise.rotary import rotary
from filet_kernels.elementwise.swiglu import swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1024, 2048, 4096, 8192] if CUDA else [256, 1024]
TOKENS = 4096 if CUDA else 512
LONG = 4 * TOKENS  # of elementwise operations: longer on a GPU than the host takes for a call
VOCABULARY = 128256 if CUDA else 8192
HIDDEN, MLP, HEAD = (4096, 14336, 128) if CUDA else (256, 688, 64)


def measure(benchmark: Any, run: Any, operations: float) -> None:
    """The operation's time; on a GPU a round waits for twenty calls, so that the host is ahead."""
    calls = itertools.count(1)
    iterations = 20 if CUDA else 1

    def once() -> None:
        run()
        if CUDA and next(calls) % iterations == 0:
            torch.cuda.synchronize()

    benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "CPU"
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.pedantic(once, rounds=10, iterations=iterations, warmup_rounds=2)
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
    truth = X.double().T @ columns
    error = (C[:, :8].double() - truth).tril().abs().max()
    theirs = (library(X)[:, :8].double() - truth).abs().max()
    assert error <= 2 * theirs + 1e-6 * TOKENS
    measure(benchmark, lambda: syrk_(C, X), 2 * TOKENS * n**2)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.benchmark(group="syrk")
def test_product_of_the_library(benchmark: Any, n: int) -> None:
    """What syrk_ is measured against: the full product, added to C."""
    X, C = operands(n)
    measure(benchmark, lambda: C.add_(library(X)), 2 * TOKENS * n**2)


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
    bound = 5e-2 if precision == "fast" else 1e-5 if CUDA else 1e-10  # a CPU sums in float64
    assert error.max() <= bound
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


def measure_bytes(benchmark: Any, run: Any, count: int) -> None:
    """GB/s count the bytes that cannot be avoided without a cache."""
    measure(benchmark, run, 0)
    del benchmark.extra_info["TFLOP/s"]
    benchmark.extra_info["GB/s"] = round(count / benchmark.stats.stats.median / 1e9, 1)


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
    # Logits are read twice and written once.
    measure_bytes(benchmark, lambda: cross_entropy_(logits, labels), 6 * TOKENS * VOCABULARY)


@pytest.mark.benchmark(group="cross-entropy")
def test_cross_entropy_of_the_library(benchmark: Any) -> None:
    """What it replaces: transformers' loss of the same bfloat16 logits, forward and backward."""
    logits, labels = logits_and_labels()
    logits.requires_grad_()

    def run() -> None:
        logits.grad = None
        F.cross_entropy(logits.float(), labels, reduction="sum").backward()

    measure_bytes(benchmark, run, 6 * TOKENS * VOCABULARY)


# What the pass runs a model's own elementwise operations by, forward and backward, against the
# modules of transformers, which are the truth here as well: they are rounded at the same places.

LLAMA = LlamaConfig(
    hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=HIDDEN // HEAD,
    num_key_value_heads=max(HIDDEN // HEAD // 4, 1), head_dim=HEAD,
)  # fmt: skip


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def compare(
    benchmark: Any, ours: Any, theirs: Any, take: str, inputs: list[torch.Tensor], count: int
) -> None:
    """Forward and backward of one of the two, after a look at both."""
    inputs = [x.requires_grad_() for x in inputs]
    shown = {}
    for name, function in (("ours", ours), ("transformers", theirs)):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(0)
        gradients = tuple(random(*y.shape) for y in outputs)
        shown[name] = (*outputs, *torch.autograd.grad(outputs, inputs, gradients))
    for a, b in zip(*shown.values(), strict=True):
        assert (a - b).abs().max() <= 2**-6 * b.abs().max()
    function = ours if take == "ours" else theirs

    def run() -> None:
        outputs = function(*inputs)
        torch.autograd.grad(outputs, inputs, gradients)

    measure_bytes(benchmark, run, count)


TAKES = pytest.mark.parametrize("take", ["ours", "transformers"])


@TAKES
@pytest.mark.benchmark(group="norm, forward and backward")
def test_rms_norm(benchmark: Any, take: str) -> None:
    norm = LlamaRMSNorm(HIDDEN).to(DEVICE, torch.bfloat16).requires_grad_(False)
    weight = norm.weight.copy_(random(HIDDEN))
    ours = lambda x: rms_norm(x, weight, eps=norm.variance_epsilon)  # noqa: E731
    # x and y; x, and a gradient in and out.
    compare(benchmark, ours, norm, take, [random(LONG, HIDDEN)], 2 * 5 * LONG * HIDDEN)


@TAKES
@pytest.mark.benchmark(group="gate, forward and backward")
def test_swiglu(benchmark: Any, take: str) -> None:
    theirs = lambda gate, up: F.silu(gate) * up  # noqa: E731
    # Two in and one out; three in and two out.
    inputs = [random(LONG, MLP) for _ in range(2)]
    compare(benchmark, swiglu, theirs, take, inputs, 2 * 8 * LONG * MLP)


@TAKES
@pytest.mark.benchmark(group="positions, forward and backward")
def test_rotary(benchmark: Any, take: str) -> None:
    heads, kv_heads = LLAMA.num_attention_heads, LLAMA.num_key_value_heads
    samples, length = LONG // 512, 512
    q, k = (random(samples, length, h, HEAD).transpose(1, 2) for h in (heads, kv_heads))
    places = torch.arange(length, device=DEVICE).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(LLAMA).to(DEVICE)(q, places)
    # Queries and keys, in and out, twice.
    count = 2 * 4 * LONG * (heads + kv_heads) * HEAD
    ours, theirs = (
        lambda q, k, turn=turn: turn(q, k, cos, sin) for turn in (rotary, apply_rotary_pos_emb)
    )
    compare(benchmark, ours, theirs, take, [q, k], count)
