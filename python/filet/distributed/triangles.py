"""Lower triangles of symmetric matrices without what lies above them: n(n+1)/2 numbers, not n².

The rectangular form of LAPACK: the left half of the columns is a trapezoid, and the triangle that
remains to the right of it fills, turned, the corner that the trapezoid leaves open. So packing is
two copies, with no list of indices.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(n: int) -> int:
    """How many numbers the lower triangle of an (n, n) matrix has, its diagonal included."""
    return n * (n + 1) // 2


def pack(square: Tensor, flat: Tensor) -> None:
    """Write the lower triangle of ``square`` (n, n) into ``flat`` (n(n+1)/2,)."""
    half, left, corner = _parts(len(square), flat)
    left.copy_(square[:, :half])
    # What is above the diagonal may be anything, NaN as well: taken away, never multiplied.
    corner.tril_(-1).add_(square[half:, half:].T.triu())


def unpack(flat: Tensor, square: Tensor) -> None:
    """Write a lower triangle back; above the diagonal, ``square`` is undefined afterwards."""
    half, left, corner = _parts(len(square), flat)
    square[:, :half].copy_(left)
    square[half:, half:].copy_(corner.T)


def _parts(n: int, flat: Tensor) -> tuple[int, Tensor, Tensor]:
    """Columns in the trapezoid, the trapezoid (n, half), and the square that it leaves half open.

    n even, half = n/2: rectangle (n + 1, half), the trapezoid one row down. n odd: (n, half) with
    half = (n + 1)/2, and the open corner one column to the right.
    """
    half = (n + 1) // 2
    odd = n % 2
    rectangle = flat.view(n + 1 - odd, half)
    return half, rectangle[1 - odd :], rectangle[: n - half, odd:]
