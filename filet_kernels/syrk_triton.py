"""Triton kernels of :mod:`filet_kernels.syrk`; a module of its own, since Triton is optional.

One source for sm_80, sm_90 and the interpreter. The lower triangle is cut into tiles, each split
over the tokens where that fills the machine (stream-K): every program takes an equal share of all
(tile, token block) steps. Programs that share a tile add to C in a fixed order, each waiting for
the one before it; every element has one owner at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from filet_kernels.dispatch import has_tma_rows
from filet_kernels.triton_common import PIECES, multiply, multiply_pieces

__all__ = ["CONFIGS", "TritonConfig", "default_config", "syrk_ragged_triton", "syrk_triton"]


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of one kernel variant. ``tma``: rows of X arrive by tensor descriptors."""

    name: str
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    tma: bool
    split: bool  # cut tiles along the tokens, so that all programs end together
    capability: int  # the least compute capability, times ten

    def unsupported(self, capability: int, tma: bool, pieces: int) -> str | None:
        """Why this configuration cannot run such a problem, or None. The one predicate."""
        if capability < self.capability:
            return f"{self.name} needs compute capability {self.capability / 10}"
        if self.tma and not tma:
            return f"{self.name} needs unmasked 16-bit rows with 16-byte strides"
        if pieces > 1 and self.tile_m * self.tile_n > 128 * 128:
            return f"{self.name} has no registers for operands in {pieces} pieces"
        return None

    def suits(self, n: int, pieces: int) -> bool:
        """Whether its tiles are of a size for such a problem."""
        if self.tile_n == 64:
            return n <= 64
        if self.tile_n == 256:
            return n >= 8192
        return (self.tile_k == 32) == (pieces > 1)


CONFIGS = (
    TritonConfig("tma-128x256", 128, 256, 64, 8, 4, tma=True, split=False, capability=90),
    TritonConfig("tma-128x128", 128, 128, 64, 8, 5, tma=True, split=True, capability=90),
    TritonConfig("rows-128x128-s4", 128, 128, 64, 8, 4, tma=False, split=True, capability=90),
    TritonConfig("rows-128x128-s3", 128, 128, 64, 8, 3, tma=False, split=True, capability=80),
    TritonConfig("rows-128x128-k32", 128, 128, 32, 8, 3, tma=False, split=True, capability=80),
    TritonConfig("rows-64x64", 64, 64, 32, 4, 3, tma=False, split=True, capability=80),
)


def default_config(n: int, capability: int, tma: bool, pieces: int) -> TritonConfig:
    """The configuration that is used where none is named: the first that suits, of those that run.

    Measured on an H200 (docs/kernels.md). The token count does not matter: every launch has at
    most 16384, and all but the widest tiles are split along them.
    """
    for config in CONFIGS:
        if config.unsupported(capability, tma, pieces) is None and config.suits(n, pieces):
            return config
    return CONFIGS[-1]


@triton.jit
def _triangular_row(index):
    row = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _block_of(index, count, GROUP: tl.constexpr):
    """Row and column of a block of the lower triangle: strips of GROUP rows, walked by columns."""
    strip = _triangular_row(index) // GROUP * GROUP
    height = tl.minimum(GROUP, count - strip)
    local = index - strip * (strip + 1) // 2
    square = height * strip
    inside = _triangular_row(tl.maximum(local - square, 0))
    row = strip + tl.where(local < square, local % height, inside)
    col = tl.where(
        local < square, local // height, strip + local - square - inside * (inside + 1) // 2
    )
    return row, col


@triton.jit
def _accumulate_tile(
    acc, x_m, x_n, weights_ptr, row0, col0, first_token, last_token, k_begin, k_end, n,
    stride_xt, stride_xn, stride_w,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, WEIGHTS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """acc += the token blocks k_begin ... k_end of Xᵀ diag(w) X for one tile."""
    for k in tl.range(k_begin, k_end):
        if TMA:
            a = x_m.load([first_token + k * TILE_K, row0])
            b = x_n.load([first_token + k * TILE_K, col0])
            acc = multiply(a, b, acc, TRANSPOSED=True)
        else:
            tokens = first_token.to(tl.int64) + k * TILE_K + tl.arange(0, TILE_K)
            counted = tokens < last_token
            if WEIGHTS != 0:
                w = tl.load(weights_ptr + tokens * stride_w, mask=counted, other=0)
                counted = counted & (w != 0)
            rows = tokens * stride_xt
            cols_m = row0 + tl.arange(0, TILE_M)
            cols_n = col0 + tl.arange(0, TILE_N)
            a = tl.load(
                x_m + rows[:, None] + cols_m.to(tl.int64)[None, :] * stride_xn,
                mask=counted[:, None] & (cols_m < n)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                x_n + rows[:, None] + cols_n.to(tl.int64)[None, :] * stride_xn,
                mask=counted[:, None] & (cols_n < n)[None, :], other=0.0,
            )  # fmt: skip
            if WEIGHTS == 2:
                scaled = a.to(tl.float32) * w.to(tl.float32)[:, None]
                acc = multiply_pieces(scaled, b.to(tl.float32), acc, PIECES, TRANSPOSED=True)
            elif PIECES == 3:
                acc = multiply_pieces(a, b, acc, PIECES, TRANSPOSED=True)
            else:
                acc = multiply(a, b, acc, TRANSPOSED=True)
    return acc


@triton.jit
def _add_tile(c_ptr, acc, row0, col0, n, alpha, stride_cm, stride_cn,
              TILE_M: tl.constexpr, TILE_N: tl.constexpr):  # fmt: skip
    """C += alpha acc below the diagonal: atomics without a result need no read of C here."""
    rows = row0 + tl.arange(0, TILE_M)
    cols = col0 + tl.arange(0, TILE_N)
    ptrs = c_ptr + rows[:, None].to(tl.int64) * stride_cm + cols[None, :].to(tl.int64) * stride_cn
    if row0 >= col0 + TILE_N:
        tl.atomic_add(ptrs, alpha * acc, mask=(rows < n)[:, None], sem="relaxed")
    else:
        # Another scope than above: one branch, with the worse mask, is made of equal ones.
        below = (rows[:, None] >= cols[None, :]) & (rows < n)[:, None]
        tl.atomic_add(ptrs, alpha * acc, mask=below, sem="relaxed", scope="sys")


@triton.jit
def _wait_for_turn(flag_ptr):
    while tl.atomic_cas(flag_ptr, 1, 0, sem="acquire") != 1:
        pass


@triton.jit
def _give_turn(flag_ptr):
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release")


@triton.jit(do_not_specialize=["tokens"])
def _syrk_kernel(
    c_ptr, x_m, x_n, weights_ptr, flags_ptr, n, tokens, alpha,
    stride_cm, stride_cn, stride_xt, stride_xn, stride_w,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    MIN_STEPS: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, WEIGHTS: tl.constexpr,
    PIECES: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = TILE_N // TILE_M  # tiles of a square block
    count = tl.cdiv(n, TILE_N)
    tiles = count * (count + 1) // 2 * PARTS
    steps = tl.cdiv(tokens, TILE_K)
    pid = tl.program_id(0)
    share = tl.maximum(tiles.to(tl.int64) * steps // MIN_STEPS, 1)
    programs = tl.minimum(tl.num_programs(0).to(tl.int64), share).to(tl.int32)
    if pid < programs:
        # Later programs wait for earlier ones, which the hardware starts first: no deadlock.
        worker = programs - 1 - pid
        if SPLIT:
            rest = tiles % programs
            cut = tl.where(tiles < programs, tiles, tl.where(rest == 0, 0, rest + programs))
        else:
            cut = 0 * tiles
        cut_steps = cut.to(tl.int64) * steps
        first = worker * cut_steps // programs
        last = (worker + 1) * cut_steps // programs
        first_tile = (first // steps).to(tl.int32)
        pieces = tl.where(last > first, tl.cdiv(last, steps).to(tl.int32) - first_tile, 0)
        whole = (tiles - cut - pid + programs - 1) // programs
        for i in range(0, pieces + whole):
            tile = tl.where(i < pieces, first_tile + i, cut + pid + (i - pieces) * programs)
            base = tile.to(tl.int64) * steps
            k_begin = tl.where(i < pieces, tl.maximum(first - base, 0), 0).to(tl.int32)
            k_end = tl.where(i < pieces, tl.minimum(last - base, steps), steps).to(tl.int32)
            block_row, block_col = _block_of(tile // PARTS, count, GROUP)
            row0 = block_row * TILE_N + tile % PARTS * TILE_M
            col0 = block_col * TILE_N
            acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            acc = _accumulate_tile(
                acc, x_m, x_n, weights_ptr, row0, col0, 0 * tokens, tokens, k_begin, k_end, n,
                stride_xt, stride_xn, stride_w,
                TILE_M, TILE_N, TILE_K, TMA, WEIGHTS, PIECES,
            )  # fmt: skip
            if SPLIT and DETERMINISTIC:
                if k_end < steps:
                    _wait_for_turn(flags_ptr + worker + 1)
            _add_tile(c_ptr, acc, row0, col0, n, alpha, stride_cm, stride_cn, TILE_M, TILE_N)
            if SPLIT and DETERMINISTIC:
                if k_begin > 0:
                    _give_turn(flags_ptr + worker)


@triton.jit(do_not_specialize=["groups"])
def _syrk_ragged_kernel(
    c_ptr, x_ptr, offsets_ptr, flags_ptr, n, groups, alpha,
    stride_cg, stride_cm, stride_cn, stride_xt, stride_xn, stride_o,
    GROUPS: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    MIN_STEPS: tl.constexpr, LONGEST: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(n, TILE)
    tiles = count * (count + 1) // 2
    lanes = tl.arange(0, GROUPS)
    begins = tl.load(offsets_ptr + lanes * stride_o, mask=lanes < groups, other=0)
    ends = tl.load(offsets_ptr + (lanes + 1) * stride_o, mask=lanes < groups, other=0)
    work = tl.cdiv(ends - begins, TILE_K).to(tl.int64) * tiles  # steps of each group
    after = tl.cumsum(work, 0)
    total = tl.sum(work, 0)
    pid = tl.program_id(0)
    share = tl.maximum(total // MIN_STEPS, 1)
    programs = tl.minimum(tl.num_programs(0).to(tl.int64), share).to(tl.int32)
    if (pid < programs) & (total > 0):
        worker = programs - 1 - pid
        position = worker * total // programs
        last = (worker + 1) * total // programs
        while position < last:
            group = tl.sum((after <= position).to(tl.int32), 0)
            mine = lanes == group
            begin = tl.sum(tl.where(mine, begins, 0), 0).to(tl.int64)
            end = tl.sum(tl.where(mine, ends, 0), 0).to(tl.int64)
            steps = tl.cdiv(end - begin, TILE_K)
            local = position - tl.sum(tl.where(mine, after - work, 0), 0)
            k_begin = (local % steps).to(tl.int32)
            k_end = tl.minimum(steps, k_begin + last - position).to(tl.int32)
            block_row, block_col = _block_of((local // steps).to(tl.int32), count, GROUP)
            row0 = block_row * TILE
            col0 = block_col * TILE
            total_acc = tl.zeros((TILE, TILE), dtype=tl.float32)
            for k in range(k_begin, k_end, LONGEST):
                acc = tl.zeros((TILE, TILE), dtype=tl.float32)
                total_acc += _accumulate_tile(
                    acc, x_ptr, x_ptr, x_ptr, row0, col0, begin, end,
                    k, tl.minimum(k + LONGEST, k_end), n,
                    stride_xt, stride_xn, 0, TILE, TILE, TILE_K, False, 0, PIECES,
                )  # fmt: skip
            if k_end < steps:
                _wait_for_turn(flags_ptr + worker + 1)
            _add_tile(
                c_ptr + group.to(tl.int64) * stride_cg, total_acc, row0, col0, n, alpha,
                stride_cm, stride_cn, TILE, TILE,
            )  # fmt: skip
            if k_begin > 0:
                _give_turn(flags_ptr + worker)
            position += k_end - k_begin


@functools.cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the compute capability times ten."""
    if device.type != "cuda":
        return 3, 90  # interpreted: a few programs, so that tiles are split in tests too
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def syrk_triton(
    C: Tensor,
    X: Tensor,
    alpha: float,
    weights: Tensor | None,
    flags: Tensor | None,
    config: TritonConfig | None = None,
) -> None:
    """C += alpha Xᵀ diag(w) X. ``flags``: zeros, one a multiprocessor and one more, zero again
    afterwards; None adds the parts of a tile in any order. ``config``: see :data:`CONFIGS`.
    """
    tokens, n = X.shape
    programs, capability = _device_limits(X.device)
    kind = 0 if weights is None else 1 if weights.dtype == torch.bool else 2
    pieces = PIECES[X.dtype] if kind == 2 or X.dtype == torch.float32 else 1
    tma = kind == 0 and X.element_size() == 2 and has_tma_rows(X)
    if config is None:
        config = default_config(n, capability, tma, 3 if kind == 2 else pieces)
    reason = config.unsupported(capability, tma, 3 if kind == 2 else pieces)
    if reason is not None:
        raise ValueError(f"config={config.name!r}: {reason}")
    if config.tma:
        x_m = TensorDescriptor.from_tensor(X, [config.tile_k, config.tile_m])
        x_n = TensorDescriptor.from_tensor(X, [config.tile_k, config.tile_n])
    else:
        x_m = x_n = X
    _syrk_kernel[(programs,)](
        C, x_m, x_n, X if weights is None else weights, C if flags is None else flags, n, tokens,
        alpha, C.stride(0), C.stride(1), X.stride(0), X.stride(1),
        0 if weights is None else weights.stride(0),
        TILE_M=config.tile_m, TILE_N=config.tile_n, TILE_K=config.tile_k, GROUP=8, MIN_STEPS=8,
        TMA=config.tma, SPLIT=config.split, WEIGHTS=kind, PIECES=pieces,
        DETERMINISTIC=flags is not None, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def syrk_ragged_triton(
    C: Tensor, X: Tensor, offsets: Tensor, alpha: float, flags: Tensor, tokens_a_sum: int
) -> None:
    """C[e] += alpha Σ x_t x_tᵀ over the rows offsets[e] ... offsets[e + 1] of X, in one launch.

    ``flags`` as in :func:`syrk_triton`. Sums over ``tokens_a_sum`` rows are rounded.
    """
    groups, n, _ = C.shape
    programs, capability = _device_limits(X.device)
    pieces = 3 if X.dtype == torch.float32 else 1
    config = default_config(n, capability, False, pieces)
    _syrk_ragged_kernel[(programs,)](
        C, X, offsets, flags, n, groups, alpha, *C.stride(), *X.stride(), *offsets.stride(),
        GROUPS=triton.next_power_of_2(groups), TILE=config.tile_m, TILE_K=config.tile_k, GROUP=8,
        MIN_STEPS=8, LONGEST=tokens_a_sum // config.tile_k, PIECES=pieces,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
