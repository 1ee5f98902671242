"""One pass over a float32 product V: what a layer returns, and what enters a second moment.

    R = round(V + bias)  in the layer's dtype,      M = round(V diag(scale))  in float16.

y = W x and h = Wᵀ g enter their moments before they are rounded to the layer's bfloat16
(docs/accuracy.md); scaled by columns, float16 keeps three bits more of them. Separate operations of
torch would read V once for each.

A row that is beyond float16's range somewhere is left out of M altogether, and said: without it the
moment is that of the other rows, and this one can be added later, by a smaller scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, by_triton

__all__ = ["LARGEST", "rounded_and_scaled", "rounded_and_scaled_reference"]

LARGEST = torch.finfo(torch.float16).max  # 65504


def rounded_and_scaled_reference(
    V: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch: R, M, and which rows were left out."""
    scaled, finite = V * scale, V.isfinite()
    left_out = ((scaled.abs() > LARGEST) & finite).any(-1) & finite.all(-1)
    M = scaled.masked_fill(left_out.unsqueeze(-1), 0).half()
    return (V if bias is None else V + bias).to(dtype), M, left_out


def rounded_and_scaled(
    V: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """R = V + bias in ``dtype`` and M = V diag(scale) in float16, each rounded once.

    Args:
        V: (..., d) float32, contiguous.
        scale: (d,) float32.
        bias: (d,), any floating dtype, or None.
        dtype: of R, bfloat16 or float16.
        flag: () int32, set to 1 where a row is left out, and else left as it is.

    Returns:
        R and M, of V's shape, and which rows were left out, (...) bool; all contiguous. A row is
        left out, zero in M, where all its numbers are finite and one, scaled, is larger than 65504.
        In others M has infinity and NaN where V has them. Deterministic. On a GPU one Triton
        kernel, where Triton is installed, and otherwise plain torch; the results are bitwise the
        same.
    """
    made: tuple[Tensor, Tensor, Tensor] = _OPERATION.choose(None, V).run(
        V, scale, bias, dtype, flag
    )
    return made


def _reference(
    V: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, flag: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rounded, scaled, left_out = rounded_and_scaled_reference(V, scale, bias, dtype)
    if flag is not None:
        flag |= left_out.any()
    return rounded, scaled, left_out


_OPERATION = Operation(
    by_triton("filet_kernels.rounded_triton", "rounded_and_scaled_triton"),
    Backend("reference", _reference),
)
