"""Triton kernel of :mod:`filet_kernels.cross_entropy`; by itself, since Triton is optional.

One source for sm_80, sm_90 and the interpreter. A program takes a row: once through it for the
largest logit and the sum of the exponentials, once more to replace each logit by its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_triton"]

# 32 warps take the registers of a multiprocessor. So each has one row under way, and the
# second pass may find it in the L2 cache: 132 rows of 128256 bfloat16 are 32 MiB.
_TILE = 16384
_PER_WARP = 512  # elements

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; finite, so that no inf − inf arises


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, vocabulary, stride_logits, stride_labels, scale,
    ignore_index, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    label = tl.load(labels_ptr + row * stride_labels)
    lanes = tl.arange(0, TILE)
    if label == ignore_index:
        for start in tl.range(0, vocabulary, TILE):
            cols = start + lanes
            zeros = tl.zeros((TILE,), dtype=logits_ptr.dtype.element_ty)
            tl.store(row_ptr + cols, zeros, mask=cols < vocabulary)
        tl.store(losses_ptr + row, 0.0)
    else:
        inside = (label >= 0) & (label < vocabulary)
        wanted = tl.load(row_ptr + label, mask=inside, other=0.0).to(tl.float32)
        # Every lane has a sum of its own, relative to the largest logit that it has seen.
        largest = tl.full((TILE,), _LOWEST, dtype=tl.float32)
        total = tl.zeros((TILE,), dtype=tl.float32)
        for start in tl.range(0, vocabulary, TILE):
            cols = start + lanes
            z = tl.load(
                row_ptr + cols, mask=cols < vocabulary, other=float("-inf"),
                eviction_policy="evict_last",
            ).to(tl.float32)  # fmt: skip
            ratio = tl.exp(-tl.abs(z - largest))  # of the smaller to the larger
            total = tl.where(z > largest, total * ratio + 1.0, total + ratio)
            largest = tl.maximum(largest, z)
        peak = tl.max(largest, 0)
        total = tl.sum(total * tl.exp(largest - peak), 0)
        factor = tl.where(inside, scale / total, float("nan"))
        loss = tl.where(inside, tl.log(total) - (wanted - peak), float("nan"))
        tl.store(losses_ptr + row, loss)
        target = tl.where(inside, label, -1).to(tl.int32)
        for start in tl.range(0, vocabulary, TILE):
            cols = start + lanes
            z = tl.load(
                row_ptr + cols, mask=cols < vocabulary, other=float("-inf"),
                eviction_policy="evict_first",
            ).to(tl.float32)  # fmt: skip
            gradient = tl.exp(z - peak) * factor
            gradient = tl.where(cols == target, gradient - scale, gradient)
            tl.store(
                row_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < vocabulary
            )


def cross_entropy_triton(logits: Tensor, labels: Tensor, scale: float, ignore_index: int) -> Tensor:
    """The losses (T,) float32; logits (T, V) become the gradient."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        tile = min(triton.next_power_of_2(vocabulary), _TILE)
        _cross_entropy_kernel[(rows,)](
            logits, labels, losses, vocabulary, logits.stride(0), labels.stride(0), scale,
            ignore_index, TILE=tile, num_warps=max(4, tile // _PER_WARP),
        )  # fmt: skip
    return losses
