import pytest
import torch

from filet_kernels.rounded import rounded_and_scaled, rounded_and_scaled_reference
from with_triton import NO_TRITON

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("shape", [(3, 5, 1030), (17, 64), (1, 1), (0, 8), (70, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_each_is_rounded_once(shape, dtype, biased, device):
    """Bitwise what torch gives in separate operations, by the dispatch and by the Triton kernel."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(shape, generator=generator).to(device)
    scale = torch.ldexp(torch.ones(shape[-1]), torch.arange(shape[-1]) % 9 - 4).to(device)
    bias = torch.randn(shape[-1], generator=generator).to(device, dtype) if biased else None
    # float64 holds the sums and products of these exactly enough for one rounding to be seen.
    rounded = V if bias is None else V + bias
    expected = rounded.to(dtype), (V.double() * scale).half()
    before = V.clone()
    runs = [rounded_and_scaled_reference(V, scale, bias, dtype)]
    runs.append(rounded_and_scaled(V, scale, bias=bias, dtype=dtype))
    if NO_TRITON is None and (device.type == "cuda" or not CUDA):
        from filet_kernels.rounded_triton import rounded_and_scaled_triton

        runs.append(rounded_and_scaled_triton(V, scale, bias, dtype))
    for number, (R, M) in enumerate(runs):
        assert R.dtype == dtype and M.dtype == torch.float16
        if number == 2 and not CUDA and dtype == torch.bfloat16:
            # Triton's interpreter cuts bfloat16 off instead of rounding it: within one unit.
            assert torch.allclose(R.double(), rounded.double(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(R, expected[0])
        assert torch.equal(M, expected[1])
    assert torch.equal(V, before)


def test_out_of_range(device):
    V = torch.tensor([[1e9, -1e9, float("nan"), 1e-9]], device=device)
    R, M = rounded_and_scaled(V, torch.ones(4, device=device), dtype=torch.bfloat16)
    assert M.tolist()[0][:2] == [float("inf"), float("-inf")] and M.isnan().tolist()[0][2]
    assert R.isfinite().tolist()[0] == [True, True, False, True] and M[0, 3] == 0
