"""Triton kernel of :mod:`filet_kernels.rounded`; a module of its own, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rounded_and_scaled_triton"]

_COLUMNS, _ROWS = 1024, 8  # of a program at a time


@triton.jit
def _kernel(
    rounded_ptr, scaled_ptr, left_out_ptr, flag_ptr, v_ptr, scale_ptr, bias_ptr, rows, columns,
    HAS_BIAS: tl.constexpr, HAS_FLAG: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    start = row.to(tl.int64)[:, None] * columns
    beyond = tl.zeros((ROWS,), tl.int32)  # of float16's range
    broken = tl.zeros((ROWS,), tl.int32)  # not finite
    for first in range(0, columns, COLUMNS):
        inside = first + column < columns
        here = (row < rows)[:, None] & inside[None, :]
        offset = start + (first + column)[None, :]
        v = tl.load(v_ptr + offset, mask=here, other=0.0)
        scale = tl.load(scale_ptr + first + column, mask=inside, other=0.0)
        scaled = v * scale[None, :]
        tl.store(scaled_ptr + offset, scaled.to(tl.float16), mask=here)
        finite = tl.abs(v) < float("inf")
        beyond |= tl.max((finite & (tl.abs(scaled) > 65504.0)).to(tl.int32), 1)
        broken |= tl.max((~finite).to(tl.int32), 1)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first + column, mask=inside, other=0.0)
            v += bias.to(tl.float32)[None, :]
        tl.store(rounded_ptr + offset, v.to(rounded_ptr.dtype.element_ty), mask=here)
    left_out = beyond & (1 - broken)
    tl.store(left_out_ptr + row, left_out.to(tl.int8), mask=row < rows)
    if tl.max(left_out, 0) > 0:
        tl.debug_barrier()  # after the stores above, by whichever threads
        for first in range(0, columns, COLUMNS):
            gone = (left_out > 0)[:, None] & (first + column < columns)[None, :]
            offset = start + (first + column)[None, :]
            tl.store(scaled_ptr + offset, tl.zeros((ROWS, COLUMNS), tl.float16), mask=gone)
        if HAS_FLAG:
            tl.store(flag_ptr, 1)


def rounded_and_scaled_triton(
    V: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, flag: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`filet_kernels.rounded.rounded_and_scaled`."""
    rounded, scaled = torch.empty_like(V, dtype=dtype), torch.empty_like(V, dtype=torch.float16)
    left_out = torch.empty(V.shape[:-1], dtype=torch.int8, device=V.device)
    if V.numel():
        columns = V.shape[-1]
        rows = V.numel() // columns
        _kernel[(triton.cdiv(rows, _ROWS),)](
            rounded, scaled, left_out, V if flag is None else flag, V, scale,
            V if bias is None else bias, rows, columns, HAS_BIAS=bias is not None,
            HAS_FLAG=flag is not None, COLUMNS=_COLUMNS, ROWS=_ROWS, num_warps=8,
        )  # fmt: skip
    return rounded, scaled, left_out.view(torch.bool)
