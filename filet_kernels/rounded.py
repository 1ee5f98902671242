"""One pass over a float32 product V: what a layer returns, and what enters a second moment.

    R = round(V + bias)  in the layer's dtype,      M = round(V diag(scale))  in float16.

y = W x and h = Wᵀ g enter their moments before they are rounded to the layer's bfloat16
(docs/accuracy.md); scaled by columns, float16 keeps three bits more of them. Separate operations of
torch would read V once for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from filet_kernels.syrk import _on, _runs_triton

__all__ = ["rounded_and_scaled", "rounded_and_scaled_reference"]


def rounded_and_scaled_reference(
    V: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    return (V if bias is None else V + bias).to(dtype), (V * scale).half()


def rounded_and_scaled(
    V: Tensor, scale: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """R = V + bias in ``dtype`` and M = V diag(scale) in float16, each rounded once.

    Args:
        V: (..., d) float32, contiguous.
        scale: (d,) float32.
        bias: (d,), any floating dtype, or None.
        dtype: of R, bfloat16 or float16.

    Returns:
        R and M, of V's shape, contiguous. Nothing is mutated; deterministic. On a GPU one Triton
        kernel, where Triton is installed, and otherwise plain torch; the results are bitwise the
        same. What is beyond float16's range becomes infinity.
    """
    if _runs_triton(V.device):
        from filet_kernels.rounded_triton import rounded_and_scaled_triton

        with _on(V.device):
            return rounded_and_scaled_triton(V, scale, bias, dtype)
    return rounded_and_scaled_reference(V, scale, bias, dtype)
