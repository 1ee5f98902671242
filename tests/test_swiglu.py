import pytest
import torch
import torch.nn.functional as F

from filet_kernels.elementwise.swiglu import swiglu
from with_triton import NO_TRITON

CUDA = torch.cuda.is_available()
SHAPES = [(3, 5, 1030), (17, 64), (1, 1), (0, 8), (2, 14336)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operands(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (scale * torch.randn(shape, generator=generator)).to(device, dtype) for scale in (4, 2, 1)
    )


def plain(gate, up):
    return F.silu(gate) * up


def with_gradients(function, gate, up, gradient):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    z = function(gate, up)
    z.backward(gradient)
    return z.detach(), gate.grad, up.grad


def triton_runs(gate, up, gradient):
    from filet_kernels.elementwise.swiglu_triton import backward, forward

    return forward(gate, up), *backward(gradient, gate, up)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(shape, dtype, device):
    """Elementwise: within the roundings of separate operations, by dispatch and by Triton."""
    gate, up, gradient = operands(shape, dtype, device)
    truth = with_gradients(plain, gate.double(), up.double(), gradient.double())
    a, b, dz = (t.double().abs() for t in (gate, up, gradient))
    # What a rounding is relative to: each factor is rounded once and the product once more. The
    # derivative of silu cancels near its zero, where its terms are at most 1.
    sizes = (a * b, dz * b * (1 + a), dz * a)
    runs = [with_gradients(swiglu, gate, up, gradient)]
    cut = not CUDA and dtype == torch.bfloat16  # the interpreter does not round it
    if NO_TRITON is None and (device.type == "cuda" or not CUDA):
        runs.append(triton_runs(gate, up, gradient))
    for number, results in enumerate(runs):
        bound = torch.finfo(dtype).eps * (2 if cut and number else 1)
        bound = max(bound, 1e-6)  # of the exponential and the division in float32
        for found, exact, size in zip(results, truth, sizes, strict=True):
            assert found.dtype == dtype and found.shape == gate.shape
            assert ((found.double() - exact).abs() <= bound * size + 1e-7).all(), number


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_where_torch_rounds(dtype, device):
    gate, up, gradient = operands((64, 512), dtype, device)
    found = with_gradients(swiglu, gate, up, gradient)
    usual = with_gradients(plain, gate, up, gradient)
    if device.type == "cpu":
        assert torch.equal(found[0], usual[0])
    if dtype != torch.float32:
        for a, b in zip(found, usual, strict=True):
            assert (a == b).double().mean() > 0.99
    for a, b in zip(found, usual, strict=True):
        # Exponential and division are each within some units of float32's last place.
        assert torch.allclose(a, b, rtol=max(2 * torch.finfo(dtype).eps, 2e-6), atol=1e-6)


def test_strides_are_any_and_nothing_is_mutated(device):
    gate, up, gradient = operands((6, 40), torch.bfloat16, device)
    expected = with_gradients(swiglu, gate, up, gradient)
    turned = [t.T.contiguous().T for t in (gate, up, gradient)]
    before = [t.clone() for t in turned]
    found = with_gradients(swiglu, *turned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(turned, before, strict=True))


def test_far_from_zero(device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    z, dgate, dup = with_gradients(swiglu, gate, torch.ones_like(gate), torch.ones_like(gate))
    assert z.tolist() == [0, 0, 0, 100, 1e4] and dup.tolist() == z.tolist()
    assert dgate.tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("gate", "up", "error", "match"),
    [
        (torch.ones(2).double(), torch.ones(2).double(), TypeError, "gate is torch.float64"),
        (torch.ones(2), torch.ones(2).half(), TypeError, "up torch.float16"),
        (torch.ones(2), torch.ones(3), ValueError, r"up \(3,\)"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "on meta"),
    ],
)
def test_errors(gate, up, error, match):
    with pytest.raises(error, match=match):
        swiglu(gate, up)
