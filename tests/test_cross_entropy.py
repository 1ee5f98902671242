import math

import pytest
import torch

from filet_kernels import cross_entropy_
from filet_kernels.cross_entropy import BACKENDS, backend_of
from with_triton import NO_TRITON, skip_interpreter

CUDA = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(5, 1), (4, 7), (9, 1000), (3, 16384), (2, 128256)]


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Each implementation that runs on the device; Triton's is interpreted on a CPU."""
    if request.param == "triton" and NO_TRITON:
        pytest.skip(NO_TRITON)
    if request.param == "triton":
        skip_interpreter(device)
    return request.param


def make(T, V, dtype, device, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(T, V, generator=generator)).to(dtype).to(device)
    return logits, torch.randint(0, V, (T,), generator=generator).to(device)


def run(logits, labels, backend, **options):
    if backend == "triton" and logits.dtype == torch.float64:
        with pytest.raises(ValueError, match=r"backend='triton' does not support.*float64"):
            cross_entropy_(logits, labels, backend=backend, **options)
        pytest.skip("float64 is the reference's")
    return cross_entropy_(logits, labels, backend=backend, **options)


def truth(logits, labels, scale=1.0):
    """Losses and gradient in float64, by exact sums: torch's own are off by 1e-12 for 2²⁰ terms."""
    x = logits.double() - logits.double().amax(-1, keepdim=True)
    terms = x.exp()
    total = x.new_tensor([[math.fsum(row)] for row in terms.tolist()])
    label = labels.long().unsqueeze(1)
    gradient = (terms / total).scatter_add(1, label, -torch.ones_like(total)) * scale
    return (total.log() - x.gather(1, label)).squeeze(1), gradient


def check(logits, labels, before, losses, scale=1.0):
    """Elementwise, against float64 from the same logits.

    Each exponential is off by ln(1/p) / 2 eps of float32, the rounding of its exponent, and by some
    1.5 of its own; their sum by the average of that, ln(V) / 2 + 1.5. Rounding to the dtype of the
    logits comes on top, half of its eps (and for float16 of its least number).
    """
    dtype = logits.dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    wanted, gradient = truth(before, labels, scale)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    error = (losses.double() - wanted).abs()
    # log of the sum, and the difference of two logits, rounded.
    assert (error <= 8 * eps * (1 + wanted)).all(), error.max()
    rounding = 0.0 if dtype.itemsize >= 4 else torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16 and not CUDA:
        rounding *= 2  # Triton's interpreter cuts bfloat16 off
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # p = exp(z − max) / sum: rounding z − max, at most ln(1/p), costs p ln(1/p) eps ≤ sqrt(p) eps.
    # At the label p − 1 is left, of one that is not small.
    p = before.double().softmax(-1)
    floor = 16 * eps * scale * torch.maximum(p, gradient.abs() / scale).sqrt()
    error = (logits.double() - gradient).abs()
    bad = error > rounding * gradient.abs() + floor + least
    assert not bad.any(), (
        f"{int(bad.sum())} elements, first {bad.nonzero()[0].tolist()}: {error[bad][0].item()}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, V", SHAPES)
def test_shapes(T, V, dtype, device, backend):
    logits, labels = make(T, V, dtype, device)
    before = logits.clone()
    check(logits, labels, before, run(logits, labels, backend))
    logits, labels = make(0, V, dtype, device)
    assert run(logits, labels, backend).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_alike(dtype, device, backend):
    """A million equal terms: what adds them one after the other is off by more with each.

    The sum of a float32 that takes 16 at a time, at most what a processor does, is off by 1e-3.
    """
    logits = torch.full((2, 2**20), -1.0, dtype=dtype, device=device)
    logits[:, 5] = 0.0
    before, labels = logits.clone(), torch.tensor([5, 7], device=device)
    check(logits, labels, before, run(logits, labels, backend))


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_strides(dtype, labels_dtype, device, backend):
    """Rows of a wider matrix, every second of them: what lies between is left alone."""
    wide, labels = make(20, 1100, dtype, device)
    logits, labels = wide[::2, 37:1037], (labels % 1000).to(labels_dtype)[::2]
    before, around = logits.clone(), wide.clone()
    scale = 2.0**7
    losses = run(logits, labels, backend, scale=scale)
    check(logits, labels, before, losses, scale)
    around[::2, 37:1037] = logits
    assert torch.equal(wide, around)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_not_read(dtype, ignore_index, device, backend):
    logits, labels = make(12, 50, dtype, device)
    labels[labels == ignore_index] = 0
    ignored = torch.arange(12, device=device) % 3 == 1
    labels[ignored] = ignore_index
    logits[ignored] = torch.nan
    before = logits.clone()
    losses = run(logits, labels, backend, ignore_index=ignore_index)
    assert (losses[ignored] == 0).all() and (logits[ignored] == 0).all()
    check(logits[~ignored], labels[~ignored], before[~ignored], losses[~ignored])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset, dtype, device, backend):
    """exp(1e4) overflows, exp(−1e4) vanishes; the log of the sum, 1e4, has an ulp of 1e-3."""
    logits, labels = make(6, 300, dtype, device)
    logits += offset
    logits[0, 5] = 0.0  # far from the others
    logits[1, 7] = -torch.inf  # a word that is masked out
    labels[1] = 8
    before = logits.clone()
    check(logits, labels, before, run(logits, labels, backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_model(dtype, device, backend):
    """p = 1 at the label: no loss and no gradient, and none of the others' either."""
    logits, labels = make(4, 100, dtype, device)
    logits[torch.arange(4), labels] = 200.0
    losses = run(logits, labels, backend)
    assert (losses == 0).all() and (logits.float().abs() < 1e-37).all()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_nan_stays_in_its_row(dtype, device, backend):
    """NaN and infinity among the logits, and labels that are neither words nor ignored."""
    logits, labels = make(8, 40, dtype, device)
    logits[1, 3], logits[2, 4], logits[3] = torch.nan, torch.inf, -torch.inf
    labels[4], labels[5], labels[6] = 40, -1, 2**31 - 1
    before = logits.clone()
    losses = run(logits, labels, backend)
    assert losses[1:7].isnan().all() and logits[1:7].isnan().all()
    fine = [0, 7]
    check(logits[fine], labels[fine], before[fine], losses[fine])


def test_rows_beyond_int32(device, backend):
    """The offset of a row does not fit 32 bits; only the rows that are used exist in memory."""
    stride = 2**30
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 9 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    storage = torch.empty(3 * stride + 16, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((4, 16), (stride, 1))
    rows, labels = make(4, 16, torch.bfloat16, device)
    logits.copy_(rows)
    check(logits, labels, rows, run(logits, labels, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_as_the_library(dtype, device):
    """To rounding what autograd gives for logits.float(), as transformers' loss does it."""
    logits, labels = make(64, 500, dtype, device)
    z = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z.float(), labels, reduction="sum")
    loss.backward()
    losses = cross_entropy_(logits, labels)
    torch.testing.assert_close(losses.sum(), loss.detach(), rtol=1e-6, atol=0)
    # float32: a GPU's exponentials are off by some units (3e-7 was seen).
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(logits, z.grad, rtol=rtol, atol=1e-7)


def test_compiles(device):
    logits, labels = make(8, 40, torch.float32, device)
    torch.library.opcheck(
        torch.ops.filet_kernels.cross_entropy_, (logits.clone(), labels, 1.0, -100)
    )

    def step(z, labels):
        z = z * 2
        losses = cross_entropy_(z, labels, scale=0.5)
        return losses.sum(), z + 1

    expected = step(logits, labels)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(logits, labels)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_default_backend(device):
    logits, labels = make(2, 8, torch.bfloat16, device)
    expected = "triton" if device.type == "cuda" and not NO_TRITON else "reference"
    assert backend_of(logits) == expected
    assert backend_of(logits.double()) == "reference"
    version = logits._version
    cross_entropy_(logits, labels)
    assert logits._version > version


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "logits is torch.int64"),
        ({"labels": torch.zeros(3)}, TypeError, "labels is torch.float32"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits has shape \(2, 3, 4\)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits has shape \(3, 0\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels has shape \(4,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "on meta"),
        ({"logits": torch.zeros(4, 3).T}, ValueError, "contiguous rows"),
        ({"logits": torch.zeros(4).expand(3, 4)}, ValueError, "do not overlap"),
        ({"logits": torch.zeros(3, 4, requires_grad=True)}, ValueError, "asks for a gradient"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'; expected None or one of"),
    ],
)
def test_wrong_operands(change, error, message):
    operands = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(error, match=message):
        cross_entropy_(operands.pop("logits"), operands.pop("labels"), **operands)
