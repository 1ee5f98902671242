"""The loss scale that keeps float16 gradients away from underflow and overflow."""

from __future__ import annotations

import math

from filet.collect.hooks import MomentHooks
from filet.collect.in_step import InStep
from filet.loss.chunked import ChunkedLoss
from filet.loss.summed import ModelLoss

__all__ = ["FP16_PEAK", "backward", "boundary_factor", "loss_scale"]

# Loss scale where gradients are float16: the largest |g| is put at 2⁴, of the first batch, or of a
# boundary between blocks. That leaves 2¹² of room below the largest float16 (65504), and 2¹⁸ above
# its smallest normal number.
FP16_PEAK = 2.0**4

# Where another gradient on the way, the logits', say, overflows before that: this far below it.
_FP16_ROOM = 2.0**5


def backward(
    loss: ChunkedLoss | ModelLoss, scale: float, index: int, retain_graph: bool = False
) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no gradient: no target module took part in it, or "
            "forward_fn ran under torch.no_grad(); expected a loss that depends on the targets"
        )
    loss.backward(scale, retain_graph)


def loss_scale(
    hooks: MomentHooks, loss: ChunkedLoss | ModelLoss, index: int, in_step: InStep
) -> float:
    """The power of two that keeps float16 gradients away from underflow and overflow.

    Found by going backward through this batch's graph, which stays for the backward that counts.
    Processes that run a model together have it in common.
    """
    hooks.phase = "probe"
    scale, ceiling = 1.0, math.inf
    for _ in range(12):
        hooks.peaks = []
        backward(loss, scale, index, retain_graph=True)
        peak = max((_nan_last(float(peak)) for peak in hooks.peaks), default=0.0)
        peak = in_step.most(peak)
        if not math.isfinite(peak):
            ceiling = scale = scale / _FP16_ROOM
            continue
        gain = 2.0 ** math.floor(math.log2(FP16_PEAK / peak)) if peak else 2.0**12
        wanted = min(scale * gain, ceiling)
        if peak and wanted <= scale:
            return wanted
        scale = wanted
    hooks.check_finite(f"batch {index} (counted from 0)")  # names where a NaN of the forward began
    raise FloatingPointError(
        f"no loss scale keeps the float16 gradients of batch {index} finite and non-zero; expected "
        "a model in bfloat16 or float32, or a batch without NaN"
    )


def boundary_factor(peak: float) -> float:
    """The power of two that brings a float16 gradient's largest number to 2³ … 2⁴.

    1 where that number is zero, infinite or a NaN.
    """
    return FP16_PEAK * 2.0 ** -math.frexp(peak)[1] if 0 < peak < math.inf else 1.0


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
