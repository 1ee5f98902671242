"""Triton kernel of :mod:`filet_kernels.congruence`; apart from it, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from filet_kernels.triton_common import PIECES, multiply_pieces

__all__ = ["add_product"]

# A 1024 × 1024 result has 128 tiles of 64 × 128, almost one for each multiprocessor of an H100. A
# congruence takes 0.34 ms then (n = 4096, W in bf16), with tiles of 128 × 128 0.52, with 64 × 64
# 0.36; of a W in fp32, six products instead of three, with 64 × 128 0.74 and with 64 × 64 0.60.
# Three stages take 88 KiB of shared memory where there is no wgmma; compute capability 8.6 has 99.
_TILE_M, _TILE_K, _WARPS, _STAGES = 64, 64, 4, 3


@triton.jit
def _product_kernel(
    c_ptr, a_ptr, b_ptr, m, n, k, diagonal,
    stride_cr, stride_cc, stride_ar, stride_ac, stride_br, stride_bc,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    B_PIECES: tl.constexpr, ANEW: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * TILE_M
    rows = row0 + tl.arange(0, TILE_M)
    cols = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    ks = tl.arange(0, TILE_K)
    a_rows = a_ptr + rows.to(tl.int64)[:, None] * stride_ar
    b_cols = b_ptr + cols.to(tl.int64)[None, :] * stride_bc
    row_mask = (rows < m)[:, None]
    col_mask = (cols < n)[None, :]

    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    whole = tl.minimum(k, row0 + diagonal) // TILE_K * TILE_K  # before, every element counts
    for k0 in tl.range(0, whole, TILE_K):
        inner = (k0 + ks).to(tl.int64)
        a = tl.load(a_rows + inner[None, :] * stride_ac, mask=row_mask, other=0.0)
        b = tl.load(b_cols + inner[:, None] * stride_br, mask=col_mask, other=0.0)
        acc = multiply_pieces(a, b, acc, B_PIECES)
    for k0 in tl.range(whole, tl.minimum(k, row0 + TILE_M + diagonal), TILE_K):
        column = k0 + ks
        inner = column.to(tl.int64)
        last = rows[:, None] + diagonal
        below = row_mask & (last >= column[None, :]) & (column < k)[None, :]
        a = tl.load(a_rows + inner[None, :] * stride_ac, mask=below, other=0.0)
        a = tl.where(last == column[None, :], 0.5 * a, a)
        b = tl.load(
            b_cols + inner[:, None] * stride_br, mask=(column < k)[:, None] & col_mask, other=0.0
        )
        acc = multiply_pieces(a, b, acc, B_PIECES)

    target = c_ptr + rows.to(tl.int64)[:, None] * stride_cr + cols.to(tl.int64)[None, :] * stride_cc
    if not ANEW:
        acc += tl.load(target, mask=row_mask & col_mask, other=0.0)
    tl.store(target, acc, mask=row_mask & col_mask)


def add_product(
    C: Tensor, A: Tensor, B: Tensor, *, diagonal: int | None = None, anew: bool = False
) -> None:
    """C += A B, or where ``anew`` C = A B, for float32 C and A and a B of at most float32.

    Of A, column j of row i counts where j < i + ``diagonal``, and half where j = i + ``diagonal``;
    what lies to the right is not read. None: all of A counts.
    """
    (m, k), n = A.shape, B.shape[1]
    tile_n = 64 if B.dtype == torch.float32 else 128
    _product_kernel[(triton.cdiv(m, _TILE_M), triton.cdiv(n, tile_n))](
        C, A, B, m, n, k, k if diagonal is None else diagonal,
        *C.stride(), *A.stride(), *B.stride(),
        TILE_M=_TILE_M, TILE_N=tile_n, TILE_K=_TILE_K,
        B_PIECES=PIECES[B.dtype], ANEW=anew, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
