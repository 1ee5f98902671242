"""The compiled extension: that it links, and what a launch that fails looks like."""

from __future__ import annotations

import shutil

import pytest
import torch

from filet_kernels.extension import cuda_extension, why_no_extension


def test_it_is_there_where_nvcc_was() -> None:
    reason = why_no_extension()
    if shutil.which("nvcc") is None and reason is not None:
        with pytest.raises(RuntimeError, match="the CUDA extension is not built"):
            cuda_extension()
        pytest.skip("no nvcc, no extension")
    assert reason is None
    assert cuda_extension().syrk_sm90_flags() > 0


@pytest.mark.skipif(why_no_extension() is not None, reason="the extension is not built")
def test_a_failed_launch_says_why() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    C, X = torch.zeros(128, 128, device=device), torch.zeros(8, 128, device=device).bfloat16()
    # Rows of 3 elements are no tensor map; without a driver nothing is.
    words = "invalid tensor map" if device == "cuda" else "driver"
    with pytest.raises(RuntimeError, match=rf"syrk_: launch failed with status -?\d+: .*{words}"):
        cuda_extension().syrk_sm90(
            c=C.data_ptr(), stride_c=128, x=X.data_ptr(), stride_x=3, n=128, tokens=8, alpha=1.0,
            half=False, split=0, flags=0, stream=0,
        )  # fmt: skip
    assert not C.any()
