"""What the Triton kernels share: products of bfloat16 pieces to float32's precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["PIECES", "multiply", "multiply_pieces", "piece"]

# How many bfloat16 numbers hold a value of this dtype to float32's precision (8 bits each).
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(a, b, acc, TRANSPOSED: tl.constexpr = False):
    """acc + a b (or aᵀ b). The interpreter multiplies bfloat16 bit patterns: triton#11584."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a.T if TRANSPOSED else a, b, acc, input_precision="ieee")


@triton.jit
def piece(x):
    """The leading bfloat16 of x, and what is left; x - piece is exact in float32."""
    piece = x.to(tl.bfloat16)
    return piece, x - piece.to(tl.float32)


@triton.jit
def multiply_pieces(a, b, acc, B_PIECES: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """acc + a b (or aᵀ b) to float32's precision: a in three bfloat16 pieces, b in B_PIECES.

    Products of pieces are exact; those below 2⁻²⁴ of the whole are left out. The tensor cores cut
    off what they add below the last bit of a sum, so the block's sum starts at zero, with the small
    products first, and is rounded into acc: cut off at every step, in any order, float32 energies
    of SmolLM2-135M were wrong by up to 3.8e-4 (H200).
    """
    a0, rest = piece(a)
    a1, rest = piece(rest)
    a2 = rest.to(tl.bfloat16)
    part = tl.zeros_like(acc)
    if B_PIECES == 1:
        b0 = b.to(tl.bfloat16)
        part = multiply(a2, b0, part, TRANSPOSED)
        part = multiply(a1, b0, part, TRANSPOSED)
    else:
        b0, rest = piece(b.to(tl.float32))
        # The same sums in either order: Triton's code is the one that was measured of each.
        if TRANSPOSED:
            part = multiply(a2, b0, part, TRANSPOSED)
            b1, rest = piece(rest)
        else:
            b1, rest = piece(rest)
            part = multiply(a2, b0, part, TRANSPOSED)
        part = multiply(a1, b1, part, TRANSPOSED)
        if B_PIECES > 2:
            part = multiply(a0, rest.to(tl.bfloat16), part, TRANSPOSED)
        part = multiply(a1, b0, part, TRANSPOSED)
        part = multiply(a0, b1, part, TRANSPOSED)
    return acc + multiply(a0, b0, part, TRANSPOSED)
