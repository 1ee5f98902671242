"""Triton kernel of :mod:`filet_kernels.quadform`; a module of its own, since Triton is optional.

One source for sm_80, sm_90 and the interpreter. A program takes TILE_M rows of S up to the diagonal
and TILE_P columns of V: it forms the rows of tril(S) V, with half of the diagonal, multiplies them
with the same rows of V and adds them up, once, into its row of a small table. The sum over the
table's rows follows in a fixed order. Long rows come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from filet_kernels.triton_common import PIECES, multiply, multiply_pieces

__all__ = ["CONFIGS", "TritonConfig", "default_config", "quadform_triton"]


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of one kernel variant: rows of S, columns of V, and the step between the two."""

    name: str
    tile_m: int
    tile_p: int
    tile_k: int
    warps: int
    stages: int
    capability: int  # the least compute capability, times ten
    accurate: bool  # whether it has the registers for operands in pieces

    def unsupported(self, capability: int, accurate: bool, element_size: int) -> str | None:
        """Why this configuration cannot run such a problem, or None. The one predicate."""
        if capability < self.capability:
            return f"{self.name} needs compute capability {self.capability / 10}"
        if accurate != self.accurate:
            return f"{self.name} is for precision={'accurate' if self.accurate else 'fast'!r}"
        if element_size > 2 and self.tile_p > 128:
            return f"{self.name} has no shared memory for a float32 V"
        return None


CONFIGS = (
    TritonConfig("128x256", 128, 256, 64, 8, 3, capability=90, accurate=False),
    TritonConfig("128x128", 128, 128, 32, 8, 3, capability=80, accurate=False),
    # 32 rows a block sum: see multiply_pieces.
    TritonConfig("128x128-pieces", 128, 128, 32, 8, 3, capability=80, accurate=True),
)


def default_config(p: int, capability: int, accurate: bool, element_size: int) -> TritonConfig:
    """The configuration that is used where none is named: the first that runs and is filled."""
    for config in CONFIGS:
        runs = config.unsupported(capability, accurate, element_size) is None
        if runs and (p > 1024 or config.tile_p <= 128):
            return config
    raise AssertionError("the last configurations run everywhere")


@triton.jit
def _step(acc, s, v, V_PIECES: tl.constexpr):
    """acc + s v, in pieces or, with V_PIECES = 0, with both rounded to bfloat16."""
    if V_PIECES > 0:
        acc = multiply_pieces(s, v, acc, V_PIECES)
    else:
        acc = multiply(s.to(tl.bfloat16), v.to(tl.bfloat16), acc)
    return acc


@triton.jit
def _quadform_kernel(
    table_ptr, s_ptr, v_ptr, n, p, stride_sr, stride_sc, stride_vr, stride_vc,
    TILE_M: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    V_PIECES: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(n, TILE_M)
    col_tiles = tl.cdiv(p, TILE_P)
    # GROUP tiles of columns at a time share their part of V; the long rows of S first.
    pid = tl.program_id(0)
    group = pid // (GROUP * row_tiles)
    width = tl.minimum(GROUP, col_tiles - group * GROUP)
    local = pid - group * GROUP * row_tiles
    row_tile = row_tiles - 1 - local // width
    row0 = row_tile * TILE_M
    col0 = (group * GROUP + local % width) * TILE_P

    rows = row0 + tl.arange(0, TILE_M)
    cols = col0 + tl.arange(0, TILE_P)
    ks = tl.arange(0, TILE_K)
    s_rows = s_ptr + rows.to(tl.int64)[:, None] * stride_sr
    v_cols = v_ptr + cols.to(tl.int64)[None, :] * stride_vc
    row_mask = (rows < n)[:, None]
    col_mask = (cols < p)[None, :]

    acc = tl.zeros((TILE_M, TILE_P), dtype=tl.float32)
    for k0 in tl.range(0, row0, TILE_K):
        k = (k0 + ks).to(tl.int64)
        s = tl.load(s_rows + k[None, :] * stride_sc, mask=row_mask, other=0.0)
        v = tl.load(v_cols + k[:, None] * stride_vr, mask=col_mask, other=0.0)
        acc = _step(acc, s, v, V_PIECES)
    for k0 in tl.range(row0, tl.minimum(row0 + TILE_M, n), TILE_K):
        column = k0 + ks
        k = column.to(tl.int64)
        below = row_mask & (rows[:, None] >= column[None, :])
        s = tl.load(s_rows + k[None, :] * stride_sc, mask=below, other=0.0)
        s = tl.where(rows[:, None] == column[None, :], 0.5 * s, s)
        v = tl.load(
            v_cols + k[:, None] * stride_vr, mask=(column < n)[:, None] & col_mask, other=0.0
        )
        acc = _step(acc, s, v, V_PIECES)

    v = tl.load(
        v_cols + rows.to(tl.int64)[:, None] * stride_vr, mask=row_mask & col_mask, other=0.0
    )
    if V_PIECES == 0:
        v = v.to(tl.bfloat16)
    total = 2 * tl.sum(v.to(tl.float32) * acc, 0)
    tl.store(table_ptr + row_tile.to(tl.int64) * p + cols, total, mask=cols < p)


def quadform_triton(
    S: Tensor, V: Tensor, accurate: bool, capability: int, config: TritonConfig | None = None
) -> Tensor:
    """diag(Vᵀ S V), (p,) float64, for n > 0 and p > 0. ``capability``: the device's, times ten;
    ``config``: see :data:`CONFIGS`.
    """
    n, p = V.shape
    if config is None:
        config = default_config(p, capability, accurate, V.element_size())
    reason = config.unsupported(capability, accurate, V.element_size())
    if reason is not None:
        raise ValueError(f"config={config.name!r}: {reason}")
    row_tiles, col_tiles = triton.cdiv(n, config.tile_m), triton.cdiv(p, config.tile_p)
    table = torch.empty(row_tiles, p, dtype=torch.float32, device=V.device)
    _quadform_kernel[(row_tiles * col_tiles,)](
        table, S, V, n, p, *S.stride(), *V.stride(),
        TILE_M=config.tile_m, TILE_P=config.tile_p, TILE_K=config.tile_k, GROUP=8,
        V_PIECES=PIECES[V.dtype] if accurate else 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return table.sum(0, dtype=torch.float64)
