"""Triton kernel of :mod:`~filet_kernels.elementwise.rotary`; apart, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rotary_triton"]

_TILE = 2048  # pairs of elements of a program


@triton.jit
def _turn(
    program, y_ptr, x_ptr, cos_ptr, sin_ptr, rows, heads, tokens, half,
    stride_yb, stride_yh, stride_yt, stride_xb, stride_xh, stride_xt,
    stride_cb, stride_ct, stride_sb, stride_st,
    BACK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    # Heads run fastest: the heads of a token lie side by side, as a rule.
    row = program.to(rows.dtype) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, (row % heads).to(tl.int64)
    batch, token = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    here = (row < rows)[:, None] & (column < half)
    x = (batch * stride_xb + head * stride_xh + token * stride_xt)[:, None] + column
    y = (batch * stride_yb + head * stride_yh + token * stride_yt)[:, None] + column
    c = (batch * stride_cb + token * stride_ct)[:, None] + column
    s = (batch * stride_sb + token * stride_st)[:, None] + column
    x1 = tl.load(x_ptr + x, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + x + half, mask=here, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + c, mask=here, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + c + half, mask=here, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + s, mask=here, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + s + half, mask=here, other=0.0).to(tl.float32)
    # Both are rounded before they are added.
    straight1, straight2 = (x1 * cos1).to(dtype), (x2 * cos2).to(dtype)
    if BACK:
        across1, across2 = (x2 * sin2).to(dtype), (-x1 * sin1).to(dtype)
    else:
        across1, across2 = (-x2 * sin1).to(dtype), (x1 * sin2).to(dtype)
    y1 = straight1.to(tl.float32) + across1.to(tl.float32)
    y2 = straight2.to(tl.float32) + across2.to(tl.float32)
    tl.store(y_ptr + y, y1.to(dtype), mask=here)
    tl.store(y_ptr + y + half, y2.to(dtype), mask=here)


# Numbers of rows: int32, or int64 where they need it; 64-bit divisions are slow.
@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_programs"])
def _kernel(
    yq_ptr, q_ptr, yk_ptr, k_ptr, cos_ptr, sin_ptr,
    q_programs, q_rows, k_rows, q_heads, k_heads, tokens, half,
    stride_yqb, stride_yqh, stride_yqt, stride_qb, stride_qh, stride_qt,
    stride_ykb, stride_ykh, stride_ykt, stride_kb, stride_kh, stride_kt,
    stride_cb, stride_ct, stride_sb, stride_st,
    BACK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _turn(
            program, yq_ptr, q_ptr, cos_ptr, sin_ptr, q_rows, q_heads, tokens, half,
            stride_yqb, stride_yqh, stride_yqt, stride_qb, stride_qh, stride_qt,
            stride_cb, stride_ct, stride_sb, stride_st, BACK, HALF, ROWS,
        )  # fmt: skip
    else:
        _turn(
            program - q_programs, yk_ptr, k_ptr, cos_ptr, sin_ptr, k_rows, k_heads, tokens, half,
            stride_ykb, stride_ykh, stride_ykt, stride_kb, stride_kh, stride_kt,
            stride_cb, stride_ct, stride_sb, stride_st, BACK, HALF, ROWS,
        )  # fmt: skip


def rotary_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """What ``rotary_reference`` gives, of q and of k; in one launch."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    yq, yk = map(_empty, (q, k))
    half = q.shape[3] // 2
    width = triton.next_power_of_2(max(half, 1))
    height = max(1, _TILE // width)
    rows = [t.numel() // max(t.shape[3], 1) for t in (q, k)]
    programs = [triton.cdiv(number, height) for number in rows]
    if half and sum(programs):
        one = cos.shape[0] == 1
        _kernel[(sum(programs),)](
            yq, q, yk, k, cos, sin,
            programs[0], *rows, q.shape[1], k.shape[1], q.shape[2], half,
            *yq.stride()[:3], *q.stride()[:3], *yk.stride()[:3], *k.stride()[:3],
            0 if one else cos.stride(0), cos.stride(1), 0 if one else sin.stride(0), sin.stride(1),
            BACK=back, HALF=width, ROWS=height, num_warps=8,
            # Else a product of bfloat16 that is added becomes an fma, and its rounding is gone.
            enable_fp_fusion=False,
        )  # fmt: skip
    return yq, yk


def _empty(x: Tensor) -> Tensor:
    """For the result: with the strides of x, unless that overlaps or has gaps."""
    y = torch.empty_like(x)
    if y.stride(-1) != 1:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y
