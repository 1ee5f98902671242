"""Initialisation at the beginning of a training by transformers' Trainer, or by one built on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from filet.adapter.saved import begin_as_saved
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
    training. A run that goes on from a checkpoint keeps the checkpoint's adapter; one with a frozen
    half gets it as it is loaded, for which the callback has to be there when the Trainer is made.

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

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if isinstance(model, PeftModel):
            # A checkpoint is loaded before anybody is told, and PEFT needs the shapes that it has.
            vars(model)["load_adapter"] = partial(_load_adapter, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vars(kwargs["model"]).pop("load_adapter", None)
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


def _load_adapter(
    peft_model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *more: Any,
    **options: Any,
) -> Any:
    """``peft_model.load_adapter``, into an adapter that has a frozen half if the folder's has."""
    begin_as_saved(peft_model, model_id, adapter_name)
    return type(peft_model).load_adapter(peft_model, model_id, adapter_name, *more, **options)
