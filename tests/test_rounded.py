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
    for number, (R, M, left_out) in enumerate(runs):
        assert left_out.shape == V.shape[:-1] and not left_out.any()
        assert R.dtype == dtype and M.dtype == torch.float16
        if number == 2 and not CUDA and dtype == torch.bfloat16:
            # Triton's interpreter cuts bfloat16 off instead of rounding it: within one unit.
            assert torch.allclose(R.double(), rounded.double(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(R, expected[0])
        assert torch.equal(M, expected[1])
    assert torch.equal(V, before)


def test_a_row_beyond_float16_is_left_out_whole(device):
    """Zero in M, flagged, and R as ever; a row with NaN or infinity stays, to be found in M."""
    V = torch.randn(21, 1500, generator=torch.Generator().manual_seed(1)).to(device)
    V[3, 1400], V[8, 2], V[8, 1100] = 1e9, -65505.0, 1e9
    V[5, 7], V[12, 0], V[12, 1] = float("nan"), float("inf"), 1e9
    V[20, 0] = 65504.0  # the largest there is
    scale = torch.ones(1500, device=device)
    scale[9], V[14, 9] = 2.0**100, 2.0**40  # beyond float32 when scaled
    V[:, 9] = torch.where(torch.arange(21, device=device) == 14, V[:, 9], 0)
    bias = torch.ones(1500, device=device)
    flags = torch.zeros(3, dtype=torch.int32, device=device)
    runs = [rounded_and_scaled_reference(V, scale, bias, torch.bfloat16)]
    runs.append(rounded_and_scaled(V, scale, bias=bias, dtype=torch.bfloat16, flag=flags[1]))
    if NO_TRITON is None and (device.type == "cuda" or not CUDA):
        from filet_kernels.rounded_triton import rounded_and_scaled_triton

        runs.append(rounded_and_scaled_triton(V, scale, bias, torch.bfloat16, flags[2]))
        assert flags.tolist() == [0, 1, 1]
    assert flags.tolist()[:2] == [0, 1]
    for number, (R, M, left_out) in enumerate(runs):
        assert left_out.nonzero().flatten().tolist() == [3, 8, 14]
        kept = ~left_out
        assert torch.equal(M[left_out], torch.zeros_like(M[left_out]))
        expected = (V * scale).half()
        assert torch.equal(M[kept].nan_to_num(7.0), expected[kept].nan_to_num(7.0))
        if number < 2 or CUDA:  # the interpreter cuts bfloat16 off
            assert torch.equal(R.nan_to_num(7.0), (V + bias).bfloat16().nan_to_num(7.0))


def test_no_flag_where_nothing_is_left_out(device):
    flag = torch.zeros((), dtype=torch.int32, device=device)
    V = torch.full((9, 40), 65504.0, device=device)
    rounded_and_scaled(V, torch.ones(40, device=device), dtype=torch.bfloat16, flag=flag)
    assert int(flag) == 0
