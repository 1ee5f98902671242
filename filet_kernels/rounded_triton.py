"""Triton kernel of :mod:`filet_kernels.rounded`; a module of its own, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rounded_and_scaled_triton"]

_COLUMNS, _ROWS = 1024, 8  # of a program


@triton.jit
def _kernel(
    rounded_ptr, scaled_ptr, v_ptr, scale_ptr, bias_ptr, rows, columns,
    HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    here = (row < rows)[:, None] & inside[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    v = tl.load(v_ptr + offset, mask=here, other=0.0)
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    tl.store(scaled_ptr + offset, (v * scale[None, :]).to(tl.float16), mask=here)
    if HAS_BIAS:
        v += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(rounded_ptr + offset, v.to(rounded_ptr.dtype.element_ty), mask=here)


def rounded_and_scaled_triton(
    V: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`filet_kernels.rounded.rounded_and_scaled`."""
    rounded, scaled = torch.empty_like(V, dtype=dtype), torch.empty_like(V, dtype=torch.float16)
    if V.numel():
        columns = V.shape[-1]
        rows = V.numel() // columns
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
        _kernel[grid](
            rounded, scaled, V, scale, V if bias is None else bias, rows, columns,
            HAS_BIAS=bias is not None, COLUMNS=_COLUMNS, ROWS=_ROWS, num_warps=8,
        )  # fmt: skip
    return rounded, scaled
