"""Initialisation at the beginning of a training by transformers' Trainer, or by one built on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from filet.collect.keep import Keep
from filet.config import FiletConfig
from filet.initialize import initialize_lora_filet_weights
from filet.loss.batch import ForwardFn
from filet.report.report import FiletReport

__all__ = ["FiletInitCallback"]


class FiletInitCallback(TrainerCallback):
    """Initialises the adapter with FILet before the first step, in all processes of a training.

    ``Trainer(model=peft_model, ..., callbacks=[filet.FiletInitCallback()])``. It runs when the
    model is where it will be trained and wrapped, and before anything is taken from the data for
    training. A run that goes on from a checkpoint keeps the checkpoint's adapter.

    Args:
        config, adapter_name, forward_fn, keep: as in :func:`filet.initialize_lora_filet_weights`.
        dataloader: batches of this process; by default those of the training, from the beginning,
            of which accelerate has dealt each process its own.

    Attributes:
        report: what was done; None before, and in a run that goes on.
    """

    def __init__(
        self,
        config: FiletConfig | None = None,
        adapter_name: str = "default",
        dataloader: Iterable[Any] | None = None,
        forward_fn: ForwardFn | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.report: FiletReport | None = None
        self._arguments: dict[str, Any] = {
            "config": config, "adapter_name": adapter_name, "forward_fn": forward_fn, "keep": keep,
        }  # fmt: skip
        self._dataloader = dataloader

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            return
        dataloader: Any = self._dataloader
        own = dataloader is None
        if own:
            dataloader = kwargs["train_dataloader"]
        try:
            self.report = initialize_lora_filet_weights(
                kwargs["model"],
                dataloader,
                show_progress_bar=not args.disable_tqdm,
                **self._arguments,
            )
        finally:
            # accelerate takes a loader that was not read to its end for one that is being read.
            if own and hasattr(dataloader, "end"):
                dataloader.end()
