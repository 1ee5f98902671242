"""The summed loss of a causal language model without its logits.

With a vocabulary of 128k the logits of a batch, and their float32 copy in the loss, would set the
peak memory. So the model runs with a stand-in for its head, which keeps the last hidden states;
head, loss and their gradient follow in the backward, some tokens at a time. Tokens without a label
never enter the head.

What the model does with its logits is not known, only seen (:meth:`HeadLoss._differs`): where they
are scaled, capped or summed up in another way, the model's own loss is taken
(:mod:`filet.loss.summed`).

Of a model that FSDP2 has sharded, the head's weight is whole where the unit that it belongs to has
gathered it: in that unit's forward, and here before the products.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from filet.config import FiletConfig
from filet.loss.sampling import drawn, uniform
from filet.model.batch import IGNORED, labels_of
from filet.model.fused import why_kept
from filet.model.sharded import unit_of
from filet_kernels import cross_entropy_

__all__ = ["CHUNK_BYTES", "CHUNK_ROWS", "ChunkedLoss", "HeadLoss", "StandIn"]

# Of logits at a time: 1024 rows of 128256 in bfloat16, enough for products at the full rate.
CHUNK_BYTES = 2**28
CHUNK_ROWS = 128  # or a multiple of it: a tile of the products

# Tokens of the first batch for which the model computes logits and loss, to see how it does.
_FEW = 8

# Its cross-entropy of them and ours are of the same logits, both in float32. An auxiliary loss of
# a mixture's router, say, is 1e-3 of the whole.
_TOLERANCE = 1e-5

# What goes to the decoder and leaves head and loss alone. With another key (shift_labels, images)
# the model's own loss is taken.
_KEYS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels"}
_KEYS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_NOT_FINITE = "the logits of a batch are not finite"


class StandIn(nn.Module):
    """In the head's place: keeps what it is given, and computes the logits of a few tokens."""

    def __init__(self, head: nn.Linear, unit: Any = None) -> None:
        """``unit``: by which FSDP2 gathers the head's weight; None where it is whole."""
        super().__init__()
        self._head, self._unit = (head,), (unit,)  # in tuples: no modules of this one
        self.few = 0
        self.hidden: Tensor | None = None
        self.shown: Tensor | None = None  # those logits
        self.cast: torch.dtype | None = None  # by autocast, which may end with the model's forward

    @property
    def weight(self) -> Tensor:
        """The head's, as it is now; models look up the dtype there."""
        return self._head[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self._head[0].bias

    def in_product(self, value: Tensor) -> Tensor:
        """Rows, weight or bias in the dtype that the head multiplied them in."""
        return value if value.dtype == torch.float64 else value.to(self.cast or value.dtype)

    def place(self, hidden: Tensor) -> torch.device:
        """Where the weight is when it is whole: FSDP2 may keep its part elsewhere."""
        return self.weight.device if self._unit[0] is None else hidden.device

    def gather(self) -> None:
        """Have the weight whole. Collective of a sharded model, whose backward would do it next."""
        if self._unit[0] is not None:
            self._unit[0].unshard()

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        place = self.place(hidden).type
        cast = torch.is_autocast_enabled(place)
        self.cast = torch.get_autocast_dtype(place) if cast else None
        if not self.few:
            return hidden
        # Of the last tokens of the first sample, which are not padding on the left.
        rows = hidden[:1, -self.few :].to(self.weight.device)
        logits = F.linear(rows, self.weight, self.bias)
        self.shown = logits.detach().clone()
        return logits

    def clear(self) -> None:
        self.few, self.hidden, self.shown = 0, None, None


class ChunkedLoss:
    """The summed loss of a batch, from the hidden states of the tokens that predict a label."""

    def __init__(
        self,
        head: StandIn,
        hidden: Tensor,
        predicts: Tensor,
        labels: Tensor | None,
        uniform: Tensor | None,
    ) -> None:
        """
        Args:
            hidden: (B, T, n), with the graph to go backward through.
            predicts: (B, T) bool, on the CPU: the tokens that count, R of them.
            labels: (R,) what they predict; None draws it from the model.
            uniform: (R, 1) numbers in [0, 1) to draw it by.
        """
        device = head.place(hidden)
        index = predicts.flatten().nonzero().squeeze(1)
        # Of every token the row that it is, and of the others one more row, of zeros: the gradient
        # of a selection that is one itself, and needs no atomics.
        row = torch.full_like(predicts.flatten(), index.numel(), dtype=torch.int64)
        row[index] = torch.arange(index.numel(), device="cpu")
        self.head = head
        self.hidden = hidden
        self.row = row.to(hidden.device, non_blocking=True)
        index = index.to(hidden.device, non_blocking=True)
        self.rows = hidden.detach().flatten(0, 1).index_select(0, index).to(device)
        self.labels = None if labels is None else labels.to(device, non_blocking=True)
        self.uniform = None if uniform is None else uniform.to(device, non_blocking=True)
        self.terms = index.numel()
        self.requires_grad = hidden.requires_grad

    def backward(self, scale: float, retain_graph: bool = False) -> None:
        """Backward from ``scale`` times the summed loss. Collective of a sharded model."""
        self.head.gather()
        gradient = self.rows.new_zeros(self.terms + 1, self.rows.shape[1])
        with torch.no_grad():
            weight = self.head.in_product(self.head.weight)
            bias = None if self.head.bias is None else self.head.in_product(self.head.bias)
            step = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
            step = max(step // CHUNK_ROWS * CHUNK_ROWS, min(step, CHUNK_ROWS))
            for start in range(0, self.terms, step):
                part = slice(start, min(start + step, self.terms))
                gradient[part] = self._gradient(part, scale, weight, bias)
            gradient = gradient.to(self.hidden.device).index_select(0, self.row)
        self.hidden.backward(gradient.view_as(self.hidden), retain_graph=retain_graph)

    def _gradient(self, part: slice, scale: float, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of the rows; logits exist in here only."""
        logits = F.linear(self.head.in_product(self.rows[part]), weight, bias)
        if self.labels is not None:
            labels = self.labels[part]
        else:
            assert self.uniform is not None
            labels = drawn(logits, self.uniform[part])
        cross_entropy_(logits, labels, scale=scale)
        return logits @ weight


@dataclass(frozen=True)
class _HeadPlace:
    """Where a model has its head, and what stands in for it."""

    siblings: dict[str, nn.Module | None]
    name: str
    stand_in: StandIn


def _unsupported(shift: bool, forward_fn: Callable[[Any, Any], Any] | None) -> str | None:
    """Why the model's loss may be another, before its head is looked at; or None."""
    if forward_fn is not None:
        return "forward_fn was given"
    return None if shift else "it is not one of transformers' causal language models"


def _head_of(peft_model: PeftModel) -> _HeadPlace | str:
    """Where the head is, or why it cannot be replaced, as far as it shows without running it."""
    head = getattr(peft_model.base_model.model, "get_output_embeddings", lambda: None)()
    if isinstance(head, ModulesToSaveWrapper) and head.active_adapters:
        head = head.modules_to_save[head.active_adapters[0]]  # the one that trains
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}; expected nn.Linear without an adapter"
    if (why := why_kept(head)) is not None:
        return f"its head {why}"
    unit = None if type(head.weight) is nn.Parameter else unit_of(peft_model, head)
    if type(head.weight) is not nn.Parameter and unit is None:
        return f"the weight of its head is a {type(head.weight).__name__}"
    if head.weight.device.type == "meta":
        return "its head is offloaded"
    modules = peft_model.named_modules(remove_duplicate=False)
    places = [name for name, module in modules if module is head]
    if len(places) != 1:
        return f"its head is at {len(places)} places"
    parent, _, name = places[0].rpartition(".")
    return _HeadPlace(peft_model.get_submodule(parent)._modules, name, StandIn(head, unit))


class HeadLoss:
    """Runs a batch up to its last hidden states, where that is all the model's loss needs."""

    def __init__(
        self,
        config: FiletConfig,
        peft_model: PeftModel,
        shift: bool,
        forward_fn: Callable[[Any, Any], Any] | None,
        most: Callable[[Any], Any] | None,
    ) -> None:
        """
        Args:
            shift: the model is known to pair a token's logits with the next label.
            most: the largest of what the processes give that run the model together: until it is
                known what the model does, all of them take a batch the same way. None of one alone.
        """
        self.config = config
        self.most = most
        self.peft_model = peft_model
        self.settled = False  # the model was seen to compute the plain cross-entropy of its head
        self.reasons: set[str] = set()  # that were said
        found = _unsupported(shift, forward_fn) or _head_of(peft_model)
        self.why_not = found if isinstance(found, str) else None
        self._place = None if isinstance(found, str) else found

    @property
    def head(self) -> StandIn:
        """What stands in for the model's head, where there is no reason against it."""
        assert self._place is not None, self.why_not
        return self._place.stand_in

    def takes(self, batch: Any) -> bool:
        """Whether the batch can go this way; the first batch that cannot says why in the log."""
        reason = self.why_not or self._unsupported_batch(batch)
        return self._said(reason if self.settled or self.why_not else self._of_all(reason))

    def __call__(self, batch: Any, host: Any) -> ChunkedLoss | None:
        """Forward. ``host``: the same batch, before it went to the device.

        None where the model turned out to do something else with its logits. Then the batch has to
        go through the whole model instead.
        """
        labels = host["labels"].cpu()
        predicts = F.pad(labels[:, 1:].ne(IGNORED), (0, 1))  # the last token predicts nothing
        wanted = labels[:, 1:][predicts[:, :-1]].long()
        with self._without_head():
            if self.settled:
                self.peft_model(**{key: batch[key] for key in batch if key != "labels"})
            elif not self._said(reason := self._of_all(self._differs(batch))):
                # The next batch may be finite.
                self.why_not = None if reason == _NOT_FINITE else reason
                return None
            self.settled = True
            hidden = self.head.hidden
        assert hidden is not None
        if self.config.fisher == "empirical":
            return ChunkedLoss(self.head, hidden, predicts, wanted, None)
        counts = predicts.sum(1).tolist()
        numbers = [uniform(self.config, host, index, n) for index, n in enumerate(counts)]
        return ChunkedLoss(self.head, hidden, predicts, None, torch.cat(numbers))

    def hidden_alone(self, batch: Any) -> None:
        """Forward of a batch without labels, for what happens on the way to the head."""
        with self._without_head():
            self.peft_model(**batch)

    def _differs(self, batch: Any) -> str | None:
        """Run the model, and see that its loss is the shifted cross-entropy of its head's output.

        It is shown a few logits and given as many labels, and has to return those very logits and
        a loss that is theirs. Returns what it did instead.
        """
        few = min(_FEW, batch["labels"].shape[1])
        labels = torch.arange(few, device=batch["labels"].device).unsqueeze(0)
        labels %= self.head.weight.shape[0]
        self.head.few = few
        result = self._inner_result({**batch, "labels": labels})
        self.head.few = 0
        hidden, shown = self.head.hidden, self.head.shown
        if hidden is None or shown is None or hidden.shape[:-1] != batch["labels"].shape:
            return "its head is not called with the hidden states of all tokens"
        logits, loss = getattr(result, "logits", None), getattr(result, "loss", None)
        if not isinstance(logits, Tensor) or not isinstance(loss, Tensor):
            return "it gives no .logits and .loss"
        if not bool(shown.isfinite().all()):
            return _NOT_FINITE
        if logits.shape != shown.shape or not torch.equal(logits.detach(), shown.to(logits)):
            return "its logits are not what its head gives"
        terms = F.cross_entropy(
            shown[0, :-1].float(), labels[0, 1:].to(shown.device), reduction="none"
        )
        sums = {"mean": float(terms.mean()), "sum": float(terms.sum())}
        if self.config.loss_reduction != "auto":
            sums = {self.config.loss_reduction: sums[self.config.loss_reduction]}
        wanted, found = " or the ".join(sums), float(loss.detach())
        if not any(math.isclose(found, expected, rel_tol=_TOLERANCE) for expected in sums.values()):
            return (
                f"its loss of {few - 1} tokens, {found:.6g}, is not the {wanted} of "
                f"their cross-entropy, {float(terms.mean()):.6g} on average"
            )
        return None

    def _inner_result(self, batch: Any) -> Any:
        """What the model returns for a batch, before FSDP2 rounds it where the PeftModel is a unit.

        Of the two modules inside, PEFT calls the outer, the inner or both, by its version and task.
        """
        results: list[Any] = []
        outer = self.peft_model.base_model
        watches = [
            module.register_forward_hook(lambda *called: results.append(called[-1]))
            for module in ((outer, outer.model) if self.most is not None else ())
        ]
        try:
            results.append(self.peft_model(**batch))
        finally:
            for watch in watches:
                watch.remove()
        return results[0]

    def _of_all(self, reason: str | None) -> str | None:
        """A reason that any of the processes has, the same in all of them."""
        if self.most is None:
            return reason
        found: str = self.most(reason or "")
        return found or None

    def _said(self, reason: str | None) -> bool:
        """Whether there is no reason; one that is new goes to the log."""
        if reason is not None and reason not in self.reasons:
            self.reasons.add(reason)
            logging.getLogger("filet").info("the model computes its own loss: %s", reason)
        return reason is None

    def _unsupported_batch(self, batch: Any) -> str | None:
        labels = labels_of(batch)
        if labels is None or labels.dim() != 2 or labels.is_floating_point():
            return "the batch has no integer labels (B, T)"
        if not _KEYS.issuperset(batch):
            return f"the batch has {', '.join(sorted(set(batch) - _KEYS))}"
        inputs = batch.get("input_ids")
        inputs = batch.get("inputs_embeds") if inputs is None else inputs
        if not isinstance(inputs, Tensor) or inputs.shape[:2] != labels.shape:
            return "the batch has no input of the labels' shape"
        if not self.settled and labels.shape[1] < 3:
            return "the batch has too few tokens to see what the model does"
        return None

    @contextlib.contextmanager
    def _without_head(self) -> Iterator[None]:
        # The module is replaced, not its forward: torch.compile looks at a module's type.
        assert self._place is not None
        siblings, name = self._place.siblings, self._place.name
        head = siblings[name]
        siblings[name] = self.head
        try:
            yield
        finally:
            siblings[name] = head
            self.head.clear()
