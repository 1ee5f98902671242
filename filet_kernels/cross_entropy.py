"""Cross-entropy of rows of logits, which become its gradient: z ← s (softmax(z) − e_label).

FILet's g starts here: the gradient of the summed token loss
    L = Σ_t (log Σ_v exp z_tv − z_t,label)
with respect to the logits (arXiv 2605.01046, Algorithm 1). With a vocabulary of 128k the logits are
the largest tensor of a pass, so they are read twice and written once, in place and in their own
dtype.

Two implementations: the Triton kernel of :mod:`filet_kernels.cross_entropy_triton`, and plain
torch. The first that supports the operands is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, by_triton, define, mutated, why_no_triton

__all__ = ["BACKENDS", "backend_of", "cross_entropy_", "cross_entropy_reference"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements of the reference's temporaries: one in float32, and one in float64 for the sum.
_ELEMENTS = 2**22


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, scale: float, ignore_index: int
) -> Tensor:
    """The losses (T,); a few rows at a time, in float32, or float64 for float64 logits.

    With x = z − max z: p = exp(x) / Σ exp(x) and loss = log Σ exp(x) − x_label. The sum is one of
    float64. In float32 its error would grow with the number of words, and depend on how many of
    them a processor adds at a time (log_softmax: 1e-5 of the sum for 128256 words and 8 at a time,
    1e-3 for 2²⁰ equal ones). What is left is the same on every processor, to a rounding: that of x,
    ln(1/p) 2⁻²⁴ of p, those of exp(x), and for the sum their average, ln(V) 2⁻²⁴.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    step = max(1, _ELEMENTS // logits.shape[1])
    for part in (slice(start, start + step) for start in range(0, logits.shape[0], step)):
        losses[part] = _some_rows(logits[part], labels[part], scale, ignore_index, dtype)
    return losses


def _some_rows(
    z: Tensor, labels: Tensor, scale: float, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    vocabulary = z.shape[1]
    label = labels.long().unsqueeze(1)
    counted = label != ignore_index
    inside = (label >= 0) & (label < vocabulary)
    label = label.clamp(0, vocabulary - 1)
    # A product with 0 would keep NaN: rows that do not count are replaced first.
    z.masked_fill_(~(counted & inside), 0)
    x = z.to(dtype)  # a copy, or z itself
    x.sub_(x.amax(-1, keepdim=True))
    wanted = x.gather(1, label)
    total = x.exp_().sum(-1, keepdim=True, dtype=torch.float64)
    loss = (total.log() - wanted).to(dtype).masked_fill(~inside, torch.nan)
    factor = torch.full_like(loss, scale).masked_fill(~inside, torch.nan)
    gradient = x.div_(total.to(dtype)).scatter_add_(1, label, loss.new_full(loss.shape, -1.0))
    z.copy_(gradient.mul_(factor.masked_fill(~counted, 0)))
    return loss.masked_fill(~counted, 0).squeeze(1)


def _triton_unsupported(logits: Tensor) -> str | None:
    wrong = None
    if logits.dtype == torch.float64:
        wrong = "logits is torch.float64; expected torch.bfloat16, torch.float16 or torch.float32"
    return why_no_triton("logits", logits.device) or wrong


_OPERATION = Operation(
    by_triton("filet_kernels.cross_entropy_triton", "cross_entropy_triton", _triton_unsupported),
    Backend("reference", cross_entropy_reference),
)
BACKENDS = _OPERATION.names


def backend_of(logits: Tensor, backend: str | None = None) -> str:
    """The implementation that :func:`cross_entropy_` uses for them: one of :data:`BACKENDS`."""
    return _OPERATION.choose(backend, logits).name


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of every row of logits, which are replaced by the gradient of the sum.

    loss_t = log Σ_v exp z_tv − z_t,label and z_t ← scale · (softmax(z_t) − e_label). A row with the
    label ``ignore_index`` is not read: its loss and its gradient are 0, and NaN there does no harm.

    Args:
        logits: (T, V), bfloat16, float16, float32 or float64. Mutated: afterwards the gradient,
            rounded to their dtype. Contiguous rows, any stride between them. T = 0 is fine.
        labels: (T,) int32 or int64, on the device of logits. Values are not checked, which would
            wait for the device: a label outside 0 … V − 1 that is not ``ignore_index`` makes the
            loss and the whole gradient of its row NaN.
        scale: factor of the gradient (of float16, say). Not of the losses.
        ignore_index: label of the rows that do not count.
        backend: one of :data:`BACKENDS`, or None for the first that supports the operands.

    Returns:
        losses (T,), float32 (float64 for float64 logits), unnormalised and unscaled.

    Computed in float32 (float64 for float64) and rounded once, at the end, relative to the row's
    largest logit: logits of any size are fine. A row with NaN or +inf, or of −inf alone, becomes
    NaN. Deterministic. Allocates only the losses (the reference also 48 MiB at a time); does not
    synchronise with the host and can be captured in a CUDA graph. Not differentiable. Traced by
    torch.compile as ``torch.ops.filet_kernels.cross_entropy_``.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes, strides or devices that do not fit, logits that ask for a gradient, or a
            backend that does not support the operands.
    """
    _check(logits, labels)
    _OPERATION.check(backend)
    losses: Tensor = torch.ops.filet_kernels.cross_entropy_(
        logits, labels, scale, ignore_index, backend
    )
    return losses


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits is {logits.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels is {labels.dtype}; expected torch.int32 or torch.int64")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (T, V) with V ≥ 1")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected ({logits.shape[0]},), one a row"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}; expected {logits.device}, as logits")
    rows, vocabulary = logits.shape
    if (vocabulary > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < vocabulary):
        raise ValueError(
            f"logits has strides {logits.stride()}; expected contiguous rows that do not overlap"
        )
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits asks for a gradient; expected logits.detach(), or torch.no_grad()")


def _cross_entropy_op(
    logits: Tensor, labels: Tensor, scale: float, ignore_index: int, backend: str | None = None
) -> Tensor:
    chosen = _OPERATION.choose(backend, logits)
    losses: Tensor = chosen.run(logits, labels, scale, ignore_index)
    mutated(logits)
    return losses


def _fake(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, float scale, int ignore_index, "
    "str? backend=None) -> Tensor",
    _cross_entropy_op,
    _fake,
)
