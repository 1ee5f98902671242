"""What an initialisation may look at: the base model, the task's data, data to keep.

Whatever several methods need of them is computed once, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from effect.moments import (
    Batch,
    LayerMoments,
    LossFn,
    input_moments,
    mean_loss,
    task_moments,
    without_labels,
)
from filet import FiletConfig, Statistics, collect_statistics

__all__ = ["Context", "Svd"]

T = TypeVar("T")
Svd = tuple[Tensor, Tensor, Tensor]  # U (m, k), σ (k,) descending, Vᵀ (k, n), float64


@dataclass(eq=False)
class Context:
    """One base model with one task's calibration data.

    Attributes:
        load: a fresh base model each time, float32, on its device; some methods write into it.
        targets: the target layers' names or their endings, as LoRA's ``target_modules``.
        rank: r of every layer. α = r, so PEFT's scaling is 1. It and the seed may be set anew.
        seed: of whatever is random.
        batches: the task's calibration data, with labels, on the model's device. Padding is what
            their ``attention_mask`` says it is; without one every token counts.
        keep: data of what is not to be forgotten, or None; labels not needed but for a ``loss_fn``.
        loss_fn: the mean loss of a batch and over how many terms.
    """

    load: Callable[[], Any]
    targets: Sequence[str]
    rank: int
    seed: int
    batches: Sequence[Batch]
    keep: Sequence[Batch] | None = None
    loss_fn: LossFn = mean_loss
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def base(self) -> Any:
        """A base model to look at. Nothing writes into it."""
        return self.load().eval().requires_grad_(False)

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The target layers of :attr:`base` by name."""
        return self.layers_of(self.base)

    def layers_of(self, model: Any) -> dict[str, nn.Linear]:
        """The target layers of a model from :attr:`load`, by their names in the base model."""
        endings = tuple(f".{target}" for target in self.targets)
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f".{name}".endswith(endings)
        }
        if not found:
            raise ValueError(
                f"targets={list(self.targets)!r} are no linear layers of this "
                f"{type(model).__name__}; expected names or endings of names"
            )
        return found

    @property
    def weights(self) -> dict[str, Tensor]:
        """W (m, n) of every target layer, float32."""
        return {name: layer.weight.detach() for name, layer in self.layers.items()}

    def config(self, **settings: Any) -> LoraConfig:
        """PEFT's configuration of an adapter of this rank on these targets."""
        return LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets), **settings
        )

    @cached_property
    def moments(self) -> dict[str, LayerMoments]:
        return task_moments(self.base, self.layers, self.batches, self.loss_fn)

    @cached_property
    def keep_moments(self) -> dict[str, Tensor]:
        """S_X of the data to keep."""
        if not self.keep:
            raise ValueError("keep=None; expected batches of what is not to be forgotten")
        return input_moments(self.base, self.layers, self.keep)

    @cached_property
    def statistics(self) -> Statistics:
        """The library's statistics of all :attr:`batches`, with those of :attr:`keep` if any."""
        return self.kept_statistics(own_text=False) if self.keep else self._collected(None)

    def kept_statistics(self, own_text: bool) -> Statistics:
        """And of :attr:`keep`, or of text drawn from the model itself."""
        if not own_text and not self.keep:
            raise ValueError("keep=None; expected batches of what is not to be forgotten")
        keep: Any = self.keep
        if self.loss_fn is mean_loss:  # its labels may be those of another task
            keep = [without_labels(batch) for batch in self.keep or ()]
        keep = "self" if own_text else keep
        return self.once(("kept", own_text), lambda: self._collected(keep))

    def _collected(self, keep: Any) -> Statistics:
        return collect_statistics(
            get_peft_model(self.load(), self.config()),
            self.batches,
            FiletConfig(samples=None),
            forward_fn=None if self.loss_fn is mean_loss else self.loss_fn,
            show_progress_bar=False,
            keep=keep,
        )

    @cached_property
    def singular(self) -> dict[str, Svd]:
        """The singular value decomposition of every W."""
        return {
            name: torch.linalg.svd(W.double(), full_matrices=False)
            for name, W in self.weights.items()
        }

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, kept under ``key``."""
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found
