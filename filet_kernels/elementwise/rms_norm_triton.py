"""Triton kernels of :mod:`~filet_kernels.elementwise.rms_norm`; apart, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

_TILE = 4096  # elements of a program, in whole rows
_PER_WARP = 512


@triton.jit
def _places(rows, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Of this program: its rows and columns, which of them there are, and where elements lie."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, here, row.to(tl.int64)[:, None] * columns + column[None, :]


@triton.jit
def _forward_kernel(
    y_ptr, r_ptr, x_ptr, weight_ptr, rows, columns, eps,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, here, offset = _places(rows, columns, COLUMNS, ROWS)
    x = tl.load(x_ptr + offset, mask=here, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)
    normal = (x * r[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, (weight[None, :] * normal).to(y_ptr.dtype.element_ty), mask=here)
    tl.store(r_ptr + row, r, mask=row < rows)


@triton.jit
def _backward_kernel(
    dx_ptr, dy_ptr, x_ptr, weight_ptr, r_ptr, rows, columns,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, here, offset = _places(rows, columns, COLUMNS, ROWS)
    r = tl.load(r_ptr + row, mask=row < rows, other=0.0)[:, None]
    v = tl.load(x_ptr + offset, mask=here, other=0.0).to(tl.float32) * r
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    d = tl.load(dy_ptr + offset, mask=here, other=0.0).to(tl.float32) * weight[None, :]
    d = d.to(dx_ptr.dtype.element_ty).to(tl.float32)
    along = tl.sum(d * v, 1) / columns
    dx = r * (d - v * along[:, None])
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=here)


def _tile(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, programs, and what a program takes."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    width = triton.next_power_of_2(columns)
    height = max(1, _TILE // width)
    warps = max(1, min(width * height // _PER_WARP, 16))
    return rows, triton.cdiv(rows, height), {"COLUMNS": width, "ROWS": height, "num_warps": warps}


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r (rows,) float32, of x, contiguous."""
    rows, programs, tile = _tile(x)
    y, r = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    if programs:
        _forward_kernel[(programs,)](y, r, x, weight, rows, x.shape[-1], eps, **tile)
    return y, r


def backward(gradient: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """∂L/∂x from ∂L/∂y; both contiguous."""
    rows, programs, tile = _tile(x)
    dx = torch.empty_like(x)
    if programs:
        _backward_kernel[(programs,)](dx, gradient, x, weight, r, rows, x.shape[-1], **tile)
    return dx
