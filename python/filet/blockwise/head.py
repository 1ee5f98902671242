"""The head and the loss, some rows of logits at a time."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from filet.blockwise.arenas import Arena, Gradient
from filet.blockwise.batches import Batch
from filet.blockwise.boundaries import Boundaries
from filet.blockwise.stream import Groups
from filet.blockwise.work import Work
from filet.collect.scale import FP16_PEAK
from filet.loss.sampling import drawn
from filet_kernels import cross_entropy_

__all__ = ["HEAD", "head", "loss_gradient"]

HEAD = "the head and the loss"

# Logits that exist at a time: 2²⁷, 0.25 GiB in bfloat16 and four times that for the loss.
_LOGITS = 2**27


def head(work: Work, boundaries: Boundaries, hidden: Arena, then: Groups) -> Gradient:
    """The gradient of the summed loss with respect to the last block's outputs, ``hidden``.

    The weights ``then`` are loaded meanwhile.
    """
    work.place.set(HEAD)
    gradients = boundaries.get()
    half = boundaries.layout.half
    scale = FP16_PEAK if half else 1.0
    peak = torch.zeros((), dtype=torch.float32, device=work.device)
    progress = work.progress("FILet head", 1, work.task)
    with progress, closing(work.stream.loaded([work.model.others])) as loaded:
        next(loaded)
        work.stream.load_ahead(then)
        for index in work.task:
            (rows,) = work.copies.fetch([hidden], index, []).ready()
            gradient = loss_gradient(work, work.batches[index], rows, scale)
            if half:
                peak = torch.maximum(peak, gradient.abs().amax())
            work.store(gradient, gradients, index)
            progress.advance(work.model.number, index)
    made = Gradient(gradients, scale, work.largest(float(peak)))
    boundaries.pool.put(hidden)
    return made


def loss_gradient(work: Work, batch: Batch, hidden: Tensor, scale: float) -> Tensor:
    """Of the summed cross-entropy, times ``scale``, some rows of logits at a time."""
    parts = work.model.parts
    hidden = hidden.requires_grad_()
    output = parts.epilogue(work.on_device(batch), hidden)
    states = output.last_hidden_state
    flat = states.detach().reshape(-1, states.shape[-1])
    gradient = torch.zeros_like(flat)
    rows, labels = batch.rows.to(work.device), batch.labels.to(work.device)
    uniform = None if batch.uniform is None else batch.uniform.to(work.device)
    head: Any = work.model.base.get_output_embeddings()
    step = max(1, _LOGITS // head.out_features)  # the weight of a quantised one may be flat
    for start in range(0, rows.numel(), step):
        chunk = slice(start, start + step)
        states_here = flat[rows[chunk]].requires_grad_()
        logits = parts.logits(output, states_here)
        with torch.no_grad():
            of_logits = logits.clone()  # what the model did to them may need them
            wanted = labels[chunk] if uniform is None else drawn(logits, uniform[chunk])
            cross_entropy_(of_logits, wanted, scale=scale)
        (part,) = torch.autograd.grad(logits, states_here, of_logits)
        gradient.index_copy_(0, rows[chunk], part)
    states.backward(gradient.view_as(states))
    assert hidden.grad is not None
    return hidden.grad
