"""Triton kernels of :mod:`~filet_kernels.elementwise.swiglu`; apart, since Triton is optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

_TILE = 2048  # elements of a program: 16 bytes of bfloat16 a thread


@triton.jit
def _silu(a):
    return a / (1.0 + tl.exp(-a))


@triton.jit
def _forward_kernel(z_ptr, gate_ptr, up_ptr, size, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = place < size
    a = tl.load(gate_ptr + place, mask=here, other=0.0).to(tl.float32)
    b = tl.load(up_ptr + place, mask=here, other=0.0).to(tl.float32)
    silu = _silu(a).to(z_ptr.dtype.element_ty).to(tl.float32)
    tl.store(z_ptr + place, (silu * b).to(z_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(
    dgate_ptr, dup_ptr, dz_ptr, gate_ptr, up_ptr, size, TILE: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = place < size
    a = tl.load(gate_ptr + place, mask=here, other=0.0).to(tl.float32)
    b = tl.load(up_ptr + place, mask=here, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + place, mask=here, other=0.0).to(tl.float32)
    silu = _silu(a).to(dup_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dup_ptr + place, (dz * silu).to(dup_ptr.dtype.element_ty), mask=here)
    d = (dz * b).to(dgate_ptr.dtype.element_ty).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-a))
    da = d * (s * (1.0 + a * (1.0 - s)))
    tl.store(dgate_ptr + place, da.to(dgate_ptr.dtype.element_ty), mask=here)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """z of gate and up, both contiguous."""
    z = torch.empty_like(gate)
    if z.numel():
        grid = (triton.cdiv(z.numel(), _TILE),)
        _forward_kernel[grid](z, gate, up, z.numel(), TILE=_TILE, num_warps=8)
    return z


def backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂gate and ∂L/∂up; all contiguous."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _TILE),)
        _backward_kernel[grid](
            dgate, dup, gradient, gate, up, gate.numel(), TILE=_TILE, num_warps=8
        )  # fmt: skip
    return dgate, dup
