import pytest
import torch

from filet_kernels.elementwise.rms_norm import WIDEST, rms_norm
from with_triton import NO_TRITON

CUDA = torch.cuda.is_available()
SHAPES = [(3, 5, 1030), (17, 64), (40, 128), (1, 1), (0, 8), (2, 4096)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def plain(x, weight):
    """As transformers' Llama computes it."""
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * v.to(x.dtype)


def operands(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = 1 + torch.randn(shape[-1], generator=generator) / 4
    return tuple(t.to(device, dtype) for t in (x * 3, weight, gradient))


def with_gradient(function, x, weight, gradient):
    x = x.detach().requires_grad_()
    y = function(x, weight)
    y.backward(gradient)
    return y.detach(), x.grad


def triton_runs(x, weight, gradient):
    from filet_kernels.elementwise.rms_norm_triton import backward, forward

    y, r = forward(x, weight, EPS)
    return y, backward(gradient, x, weight, r)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(shape, dtype, device):
    """The dispatch and the Triton kernels; no worse than what torch computes step by step."""
    x, weight, gradient = operands(shape, dtype, device)
    truth = with_gradient(
        lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        x.double(), weight.double(), gradient.double(),
    )  # fmt: skip
    usual = with_gradient(plain, x, weight, gradient)
    runs = [with_gradient(lambda x, w: rms_norm(x, w, eps=EPS), x, weight, gradient)]
    # The interpreter cuts bfloat16 off instead of rounding it.
    cut = not CUDA and dtype == torch.bfloat16
    if NO_TRITON is None and (device.type == "cuda" or not CUDA):
        runs.append(triton_runs(x, weight, gradient))
    for number, (y, dx) in enumerate(runs):
        assert y.dtype == dx.dtype == dtype and y.shape == dx.shape == x.shape
        for found, other, exact in zip((y, dx), usual, truth, strict=True):
            if not x.numel():
                continue
            size = exact.abs().amax(-1, keepdim=True)
            error = ((found.double() - exact).abs() / size).max()
            bound = ((other.double() - exact).abs() / size).max() * (4 if cut and number else 1.5)
            assert error <= bound + 2**-23, (number, error, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_where_llama_rounds(dtype, device):
    x, weight, gradient = operands((64, 4096), dtype, device)
    y, dx = with_gradient(lambda x, w: rms_norm(x, w, eps=EPS), x, weight, gradient)
    usual, dusual = with_gradient(plain, x, weight, gradient)
    if device.type == "cpu":
        assert torch.equal(y, usual)
    elif dtype != torch.float32:
        # The sum of squares in another order, now and then, is another rounding.
        assert (y == usual).double().mean() > 0.99
    assert torch.allclose(y, usual, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (dx - dusual).abs().max() <= 4 * torch.finfo(dtype).eps * dusual.abs().max()


def test_strides_are_any(device):
    x, weight, gradient = operands((6, 32, 16), torch.float32, device)
    expected = with_gradient(lambda x, w: rms_norm(x, w, eps=EPS), x, weight, gradient)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = with_gradient(
        lambda x, w: rms_norm(x, w, eps=EPS),
        turned, weight.repeat_interleave(2)[::2],
        gradient.transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_deterministic_and_nothing_mutated(device):
    x, weight, gradient = operands((33, 200), torch.bfloat16, device)
    before = [t.clone() for t in (x, weight, gradient)]
    runs = [with_gradient(lambda x, w: rms_norm(x, w, eps=EPS), x, weight, gradient)] * 2
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, weight, gradient), before, strict=True))


def test_not_a_number_stays_in_its_row(device):
    x, weight, _ = operands((4, 32), torch.bfloat16, device)
    x[1, 3] = float("nan")
    assert rms_norm(x, weight, eps=EPS).isnan().all(1).tolist() == [False, True, False, False]
    assert not rms_norm(torch.zeros_like(x), weight, eps=EPS).any()


@pytest.mark.parametrize(
    ("x", "weight", "error", "match"),
    [
        (torch.ones(2, 4).double(), torch.ones(4).double(), TypeError, "x is torch.float64"),
        (torch.ones(2, 4), torch.ones(4).half(), TypeError, "weight is torch.float16; expected"),
        (torch.ones(2, 4), torch.ones(3), ValueError, r"x \(2, 4\) and weight \(3,\)"),
        (torch.tensor(1.0), torch.ones(1), ValueError, r"x \(\) and weight"),
        (torch.ones(1, WIDEST + 1), torch.ones(WIDEST + 1), ValueError, f"n ≤ {WIDEST}"),
        (torch.ones(2, 4), torch.ones(4, requires_grad=True), ValueError, "asks for a gradient"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), ValueError, "weight is on meta"),
    ],
)
def test_errors(x, weight, error, match):
    with pytest.raises(error, match=match):
        rms_norm(x, weight, eps=EPS)
