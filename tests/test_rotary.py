import pytest
import torch

from filet_kernels.elementwise.rotary import rotary, rotary_reference
from with_triton import NO_TRITON

CUDA = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Batch, heads of queries and of keys, tokens, size of a head.
SHAPES = [(2, 4, 2, 7, 16), (1, 3, 3, 5, 6), (3, 32, 8, 33, 128), (2, 2, 1, 0, 8), (1, 1, 1, 1, 2)]


def operands(shape, dtype, device, *, one=False):
    batch, heads, kv_heads, tokens, size = shape
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    # As a model has them: heads side by side, turned to the front.
    q, k, dq, dk = (random(batch, tokens, h, size).transpose(1, 2) for h in (heads, kv_heads) * 2)
    cos, sin = (random(1 if one else batch, tokens, size) for _ in range(2))
    return q, k, cos, sin, dq, dk


def plain(q, k, cos, sin):
    """As transformers' Llama computes it."""

    def half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def with_gradients(function, q, k, cos, sin, dq, dk):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    turned = function(q, k, cos, sin)
    torch.autograd.backward(turned, (dq, dk))
    return [t.detach() for t in turned] + [q.grad, k.grad]


def triton_runs(q, k, cos, sin, dq, dk):
    from filet_kernels.elementwise.rotary_triton import rotary_triton

    return [*rotary_triton(q, k, cos, sin), *rotary_triton(dq, dk, cos, sin, back=True)]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_what_separate_operations_give(dtype, shape, one, device):
    tensors = operands(shape, dtype, device, one=one)
    before = [t.clone() for t in tensors]
    expected = with_gradients(plain, *tensors)
    runs = [with_gradients(rotary, *tensors)]
    if NO_TRITON is None and (device.type == "cuda" or not CUDA):
        runs.append(triton_runs(*tensors))
    for number, results in enumerate(runs):
        for found, usual in zip(results, expected, strict=True):
            assert found.dtype == dtype and found.shape == usual.shape
            if number == 1 and not CUDA and dtype == torch.bfloat16:
                # Triton's interpreter cuts bfloat16 off instead of rounding it, three times.
                assert ((found - usual).abs() <= 2**-6 * 32).all()  # numbers are within 4
            else:
                assert torch.equal(found, usual)
    if tensors[0].numel():
        assert runs[0][0].stride() == tensors[0].stride()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_truth(device):
    """A turn by an angle, in float64 by complex numbers."""
    q, k, _, _, dq, dk = operands((2, 4, 2, 9, 16), torch.float32, device)
    angle = torch.arange(9.0, device=device)[:, None] * torch.logspace(0, -3, 8, device=device)
    angle = torch.cat((angle, angle), -1).expand(2, 9, 16)
    turned, _, gradient, _ = with_gradients(rotary, q, k, angle.cos(), angle.sin(), dq, dk)
    phase = torch.polar(torch.ones_like(angle[..., :8]).double(), angle[..., :8].double())
    for found, x, by in ((turned, q, phase), (gradient, dq, phase.conj())):
        z = torch.complex(*x.double().chunk(2, -1)) * by.unsqueeze(1)
        truth = torch.cat((z.real, z.imag), -1)
        assert (found - truth).abs().max() <= 4e-6  # of float32's sine and cosine, mostly


def test_strides_are_any(device):
    tensors = operands((2, 4, 2, 7, 16), torch.bfloat16, device)
    expected = with_gradients(rotary, *tensors)
    shifted = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    for a, b in zip(with_gradients(rotary, *shifted), expected, strict=True):
        assert torch.equal(a, b)
    repeated = tensors[1][:, :1].expand(-1, 2, -1, -1)
    turned = rotary(tensors[0], repeated, *tensors[2:4])[1]
    assert torch.equal(turned, rotary_reference(repeated, *tensors[2:4]))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: torch.float64}, TypeError, "torch.float64, torch.float32"),
        ({0: (1, 2, 3, 4), 2: (1, 3, 6)}, ValueError, r"\(1, 3, 6\)"),
        ({0: (1, 2, 3, 5), 1: (1, 2, 3, 5), 2: (1, 3, 5), 3: (1, 3, 5)}, ValueError, "D even"),
        ({2: (3, 4)}, ValueError, r"expected \(B, H, T, D\)"),
        ({3: (2, 3, 4)}, ValueError, r"\(2, 3, 4\)"),
        ({1: (2, 1, 3, 4)}, ValueError, r"\(2, 1, 3, 4\)"),
        ({1: "meta"}, ValueError, "on cpu, meta; expected one device"),
    ],
)
def test_errors(change, error, match):
    shapes = [(1, 2, 3, 4), (1, 2, 3, 4), (1, 3, 4), (1, 3, 4)]
    tensors = [torch.ones(shape) for shape in shapes]
    for index, what in change.items():
        if isinstance(what, tuple):
            tensors[index] = torch.ones(what)
        else:
            tensors[index] = tensors[index].to(what)
    with pytest.raises(error, match=match):
        rotary(*tensors)
