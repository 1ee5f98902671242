"""Second moments of inputs and output gradients and the mean gradient, by plain hooks.

For a layer y = W x and the summed loss L, over counted tokens t and loss terms,
    S_X = 1/T Σ_t x_t x_tᵀ,   S_Y = 1/T Σ_t g_t g_tᵀ,   g_t = ∂L/∂y_t,   G = 1/terms Σ_t g_t x_tᵀ.
Everything is in full and in float64: these are the truth that published recipes are written in, and
independent of what the library makes of the same data. A token counts unless the batch's
``attention_mask`` is 0 there; one without a label counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from filet.model.batch import IGNORED

__all__ = [
    "Batch",
    "LayerMoments",
    "LossFn",
    "as_one_sample",
    "counted_tokens",
    "input_moments",
    "joined",
    "mean_loss",
    "task_moments",
    "without_labels",
]

Batch = Mapping[str, Tensor]
# (model, batch) → the mean loss and over how many terms.
LossFn = Callable[[Any, Batch], tuple[Tensor, int]]


@dataclass(eq=False)
class LayerMoments:
    """Of one layer, W (m, n), float64. Layers of one input share the same S_X."""

    S_X: Tensor  # (n, n)
    S_Y: Tensor  # (m, m)
    G: Tensor  # (m, n)


def mean_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss of a model of transformers, and over how many labels it is the mean."""
    labels = batch["labels"]
    if model.loss_type == "ForCausalLM":  # a label is predicted by the token before its own
        labels = labels[:, 1:]
    return model(**batch).loss, int((labels != IGNORED).sum())


def counted_tokens(batch: Batch) -> Tensor | None:
    """(samples, tokens) bool of the tokens that count, None for all of them."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def without_labels(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """All samples as one batch. Sequences of different lengths are padded on the right."""
    longest = max(batch["input_ids"].shape[1] for batch in batches) if _uneven(batches) else 0
    parts: dict[str, list[Tensor]] = {key: [] for key in batches[0]}
    for batch in batches:
        whole = dict(batch)
        if longest:
            ids = batch["input_ids"]
            whole.setdefault("attention_mask", torch.ones_like(ids))
            missing = longest - ids.shape[1]
            for key, value in whole.items():
                if value.shape[:2] == ids.shape:
                    fill = IGNORED if key == "labels" else 0
                    whole[key] = nn.functional.pad(value, (0, missing), value=fill)
        for key, value in whole.items():
            parts.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}


def _uneven(batches: Sequence[Batch]) -> bool:
    return len({batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch}) > 1


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """The counted rows of (samples, tokens, d); all where the mask is of something else."""
    if counted is not None and counted.shape == x.shape[:-1]:
        return x[counted]
    return x.reshape(-1, x.shape[-1])


def _placed(rows: Tensor, shape: torch.Size, counted: Tensor | None) -> Tensor:
    """What :func:`_rows` took, back where it was in ``shape``; 0 at tokens that do not count."""
    if counted is not None and counted.shape == shape:
        whole = rows.new_zeros(*shape, rows.shape[-1])
        whole[counted] = rows
        return whole
    return rows.view(*shape, rows.shape[-1])


@contextlib.contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Sums:
    """Sums over the batches that go through while the hooks are on."""

    def __init__(self, layers: Mapping[str, nn.Linear], gradients: bool) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}  # of layers that are called with the same tensor
        self.tokens: dict[str, int] = {}
        self.counted: Tensor | None = None
        self.gradients = gradients
        self._last: tuple[Tensor, str] | None = None
        self.handles = [
            module.register_forward_hook(partial(self._forward, name))
            for name, module in layers.items()
        ]

    def _forward(self, name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        if self._last is None or self._last[0] is not x:
            self._last = (x, name)
        leader = self.leaders.setdefault(name, self._last[1])
        rows = _rows(x.detach(), self.counted)
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)
        if leader == name:
            _add(self.inputs, name, rows, rows)
        if self.gradients:
            if not output.requires_grad:  # nothing below it trains
                output.requires_grad_()
            output.register_hook(partial(self._backward, name, rows))

    def _backward(self, name: str, rows: Tensor, gradient: Tensor) -> None:
        g = _rows(gradient, self.counted)
        _add(self.outputs, name, g, g)
        _add(self.products, name, g, rows)

    def batch(self, batch: Batch) -> None:
        self.counted, self._last = counted_tokens(batch), None

    def input_moments(self) -> dict[str, Tensor]:
        """S_X by layer; the very same tensor where the inputs are the same."""
        means = {name: total / self.tokens[name] for name, total in self.inputs.items()}
        return {name: means[leader] for name, leader in self.leaders.items()}


def _add(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """sums[name] += leftᵀ right in float64."""
    product = left.double().T @ right.double()
    sums[name] = sums[name].add_(product) if name in sums else product


def task_moments(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    loss_fn: LossFn = mean_loss,
) -> dict[str, LayerMoments]:
    """:class:`LayerMoments` of ``layers``, which are the model's own, over ``batches``.

    The model is frozen and in eval mode; it and its random state come back as they were.
    """
    sums, terms = _Sums(layers, gradients=True), 0
    with _hooked(sums.handles), torch.enable_grad():
        for batch in batches:
            sums.batch(batch)
            loss, count = loss_fn(model, batch)
            (loss * count).backward()
            terms += count
    inputs = sums.input_moments()
    return {
        name: LayerMoments(
            inputs[name], sums.outputs[name] / sums.tokens[name], sums.products[name] / terms
        )
        for name in layers
    }


@torch.no_grad()
def input_moments(
    model: Any, layers: Mapping[str, nn.Linear], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """S_X alone, forward only; labels are left out."""
    sums = _Sums(layers, gradients=False)
    with _hooked(sums.handles):
        for batch in batches:
            sums.batch(batch)
            model(**without_labels(batch))
    found = sums.input_moments()
    return {name: found[name] for name in layers}


def as_one_sample(
    layers: Mapping[str, nn.Linear], counted: Tensor | None
) -> AbstractContextManager[None]:
    """Inside, the layers are called with the counted rows of a batch as one sample (1, T, n).

    For hooks that take no batches; those that were there before see the rows. What comes out of a
    layer is put back to its place, with 0 at the tokens that do not count.
    """
    shapes: dict[nn.Module, torch.Size] = {}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[module] = args[0].shape[:-1]
        return (_rows(args[0], counted).unsqueeze(0), *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _placed(output[0], shapes[module], counted)

    handles: list[Any] = [each.register_forward_pre_hook(before) for each in layers.values()]
    handles += [each.register_forward_hook(after) for each in layers.values()]
    return _hooked(handles)
