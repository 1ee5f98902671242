"""Initialisation for a training by transformers' Trainer, or by one built on it, TRL's say.

Before it, with the trainer's own data and loss; or at its beginning, by a callback.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback

from filet.adapter.saved import begin_as_saved
from filet.collect.keep import Keep
from filet.config import FiletConfig, checked_config
from filet.distributed.group import current
from filet.distributed.samples import share
from filet.initialize import initialize_lora_filet_weights
from filet.loss.batch import ForwardFn
from filet.model.batch import mapped, samples_in, tensors_in
from filet.model.factors import StartedFactor
from filet.model.isolation import adapters_put_back, gradients_put_back
from filet.model.sharded import over_shards, whole
from filet.model.targets import find_targets
from filet.model.values import unpack
from filet.report.report import FiletReport
from filet.system.transfer import values

__all__ = ["FiletInitCallback", "initialize_from_trainer"]

# What trainers of TRL count in their losses for their logs, and by which methods of accelerate's.
_COUNTED = ("_metrics", "_total_train_tokens")
_GATHERING = ("gather", "gather_for_metrics")


def initialize_from_trainer(
    trainer: Trainer,
    config: FiletConfig | None = None,
    adapter_name: str = "default",
    keep: Keep | None = None,
) -> FiletReport:
    """Initialise the adapter of a trainer's model with FILet, on the trainer's own data and loss.

    To be called before ``trainer.train()``. Model, data set, collator, sampler and batch size are
    the trainer's, and the loss is ``trainer.compute_loss``, of transformers' Trainer, TRL's
    SFTTrainer and DPOTrainer, or a class of your own. The trainer comes back as it was, random
    states and counts of its logs included; only the adapter is another.

    Args:
        trainer: whose ``model`` is a PeftModel; TRL makes one with ``peft_config=``.
        config, adapter_name, keep: as in :func:`filet.initialize_lora_filet_weights`. Of pairs
            (DPO), ``config.samples`` counts both sequences, and no pair is cut.

    Returns:
        As :func:`filet.initialize_lora_filet_weights`.

    The loss may be a mean or a sum over the labels of a batch. Of transformers' own Trainer that is
    found by comparing it with the logits, unless it smoothes labels. Where ``compute_loss`` is
    another it is taken for a mean, or for what ``config.loss_reduction`` says; that of DPO is a
    mean over the pairs.

    Where ``torch.distributed`` has several processes, all of them call this; accelerate deals each
    its own samples.

    Raises:
        TypeError: no Trainer, or a model without an adapter.
        ValueError: a trainer whose data are made while it trains (GRPO, RLOO), pairs in another
            form than TRL's of today, a reference (TRL's adapter "ref") that was trained, a trainer
            of fewer processes than there are; and as :func:`filet.initialize_lora_filet_weights`.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}; expected a transformers.Trainer, or what is "
            "built on it"
        )
    _check_processes(trainer.args)
    with current() or contextlib.nullcontext():  # what one process raises, all do
        return _from_trainer(trainer, config, adapter_name, keep)


def _from_trainer(
    trainer: Trainer, config: FiletConfig | None, adapter_name: str, keep: Keep | None
) -> FiletReport:
    if hasattr(trainer, "reward_funcs"):
        raise ValueError(
            f"{type(trainer).__name__} generates what it trains on: there are no data with a loss "
            "yet; expected a Trainer, SFTTrainer or DPOTrainer, or batches with labels for "
            "filet.initialize_lora_filet_weights"
        )
    config = checked_config(config)
    if _has_pairs(trainer):
        _check_reference(trainer)
    # That of the training is made anew, and draws the same.
    with torch.random.fork_rng(devices=[]):
        loader: Any = trainer.get_train_dataloader()
    try:
        with _without_metrics(trainer):
            return initialize_lora_filet_weights(
                trainer.accelerator.unwrap_model(trainer.model),
                _whole_pairs(loader, config.samples) if _has_pairs(trainer) else loader,
                config,
                adapter_name,
                _TrainersLoss(trainer),
                not trainer.args.disable_tqdm,
                keep,
            )
    finally:
        _end(loader)


@dataclasses.dataclass(frozen=True, eq=False)
class _Output:
    """What a forward_fn returns."""

    loss: Tensor
    logits: Tensor | None


class _TrainersLoss:
    """A trainer's loss of a batch, as a forward_fn.

    Data to keep have none: their labels, if there are any, are not for this loss.
    """

    takes_unlabelled = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._label = "completion_mask" if _has_pairs(trainer) else "labels"
        # Another compute_loss may run the model once more for the logits.
        plain = type(trainer).compute_loss is Trainer.compute_loss
        self._compared = plain and trainer.label_smoother is None

    def __call__(self, model: Any, batch: Any) -> Any:
        # The model has it in its forward when accelerate has prepared it, for the training.
        with self._trainer.accelerator.autocast():
            if isinstance(batch, Mapping) and self._label in batch:
                return self._loss(model, batch)
            return model(**batch)  # data to keep, of which no loss is wanted

    def _loss(self, model: Any, batch: Any) -> Any:
        inputs = dict(batch)  # entries are added and taken out
        trainer = self._trainer
        with contextlib.ExitStack() as stack:
            # A loss that runs the reference switches adapters, and so thaws them.
            stack.enter_context(gradients_put_back(model))
            stack.enter_context(adapters_put_back(model))
            stack.enter_context(trainer.compute_loss_context_manager())
            if self._compared:
                loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
                return _Output(loss, getattr(outputs, "logits", None))
            loss = trainer.compute_loss(model, inputs)
        return (loss, samples_in(batch) // 2) if _has_pairs(trainer) else loss


def _has_pairs(trainer: Any) -> bool:
    """Whether it is a DPOTrainer of TRL, which need not be installed."""
    return any(
        each.__name__ == "DPOTrainer" and each.__module__.partition(".")[0] == "trl"
        for each in type(trainer).__mro__
    )


def _check_processes(args: Any) -> None:
    """ValueError where accelerate does not know of the other processes: each would train alone."""
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size != args.world_size:
        raise ValueError(
            f"torch.distributed has {size} processes, and the trainer knows of {args.world_size}: "
            "each would train by itself; expected use_cpu=True in its arguments, where they run "
            "on CPUs"
        )


def _check_reference(trainer: Any) -> None:
    """ValueError where the reference of pairs is not what the adapter starts from, the base.

    Of a PeftModel TRL makes it by copying the adapter as it is then.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is not None or "ref" not in getattr(model, "peft_config", ()):
        return
    for name, target in find_targets(model, "ref")[0].items():
        A, B = target.A, target.B
        if isinstance(A, StartedFactor) and isinstance(B, StartedFactor):
            # [B, −B0] [A; A0] at its start
            moved = not (_equal(A.trained, A.start) and _equal(B.trained, -B.start))
        else:
            moved = bool(A.weight.any()) and bool(B.weight.any())
        if moved or (B.bias is not None and bool(B.bias.any())):
            raise ValueError(
                "the trainer's reference, adapter 'ref', is a copy of one that was trained (at "
                f"{name}), and a new start would be far from it; expected to train on without "
                "an initialisation, or an adapter on a base into which that one was merged"
            )


def _equal(trained: Tensor, start: Tensor) -> bool:
    return torch.equal(trained, start.to(trained))


def _whole_pairs(loader: Any, samples: int | None) -> Iterator[Any]:
    """Batches of pairs, as many as make ``samples`` sequences in all processes, never a half one.

    A batch has first what was chosen of all its pairs, then what was rejected.
    """
    most = None if samples is None else samples // 2
    group = current()
    if group is not None:
        # As many for each: one more could be a sequence too many for its process.
        most = None if most is None else most // group.size * group.size
        loader, most = share(group, loader, most)
    for batch in loader:
        if not {"input_ids", "completion_mask"} <= batch.keys():
            raise ValueError(
                f"a batch of pairs has {', '.join(map(str, batch))}; expected input_ids and "
                "completion_mask of the chosen and then the rejected ones, as TRL 1.16 has them"
            )
        pairs = samples_in(batch) // 2
        yield batch if most is None or pairs <= most else _first_pairs(batch, most)
        if most is not None:
            most -= pairs
            if most <= 0:
                return


def _first_pairs(batch: Any, size: int) -> Any:
    """The first pairs of a batch; all of one that cannot be divided, for its images."""
    rows = samples_in(batch)
    if any(len(tensor) not in (rows, rows // 2) for tensor in tensors_in(batch)):
        return batch

    def cut(value: Any) -> Any:
        halves = value.split(rows // 2)
        return torch.cat([half[:size] for half in halves])

    return mapped(batch, cut)


@contextlib.contextmanager
def _without_metrics(trainer: Any) -> Iterator[None]:
    """What a trainer of TRL counts for its logs is afterwards what it was, and counted by itself.

    It gathers it from all processes in every batch, and they have not as many batches.
    """
    before = {
        name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTED if name in vars(trainer)
    }
    own = vars(trainer.accelerator)
    if before:
        own |= dict.fromkeys(_GATHERING, _itself)
    try:
        yield
    finally:
        vars(trainer).update(before)
        for name in _GATHERING if before else ():
            del own[name]


def _itself(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _end(loader: Any) -> None:
    """accelerate takes a loader that was not read to its end for one that is being read."""
    if hasattr(loader, "end"):
        loader.end()


def _generators(loader: Any) -> list[torch.Generator]:
    """Those that a loader draws its order by."""
    found, places = [], [loader]
    while places:
        place = places.pop()
        found.append(getattr(place, "generator", None))
        names = ("batch_sampler", "sampler", "dataset")
        places += [getattr(place, name) for name in names if hasattr(place, name)]
    return [each for each in found if isinstance(each, torch.Generator)]


class FiletInitCallback(TrainerCallback):
    """Initialises the adapter with FILet before the first step, in all processes of a training.

    ``Trainer(model=peft_model, ..., callbacks=[filet.FiletInitCallback()])``. It runs when the
    model is where it will be trained and wrapped, and before anything is taken from the data for
    training. A run that goes on from a checkpoint keeps the checkpoint's adapter; one with a frozen
    half gets it as it is loaded, for which the callback has to be there when the Trainer is made.
    What it has initialised it leaves alone when ``train()`` is called again.

    Args:
        config, adapter_name, forward_fn, keep: as in :func:`filet.initialize_lora_filet_weights`.
        dataloader: batches of this process; by default those of the training, from the beginning,
            of which accelerate has dealt each process its own.

    Attributes:
        report: what was done; None before, and in a run that goes on.

    ValueError at the beginning of a training, with the model as it was, for an adapter that was
    trained before: one whose B PEFT starts at 0, and which is not. And as
    :func:`filet.initialize_lora_filet_weights`.
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
        self._done: weakref.ref[Any] | None = None  # the model that was initialised

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if isinstance(model, PeftModel):
            # A checkpoint is loaded before anybody is told, and PEFT needs the shapes that it has.
            vars(model)["load_adapter"] = partial(_load_adapter, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vars(kwargs["model"]).pop("load_adapter", None)
        _check_processes(args)
        if state.global_step or (self._done is not None and self._done() is kwargs["model"]):
            return
        _check_untrained(kwargs["model"], self._arguments["adapter_name"])
        dataloader: Any = self._dataloader
        own = dataloader is None
        if own:
            dataloader = kwargs["train_dataloader"]
            # Of several processes accelerate gives the sampler a generator of its own, and with
            # use_seedable_sampler=False the training would go on where this reading left it.
            before = [(each, each.get_state()) for each in _generators(dataloader)]
        try:
            self.report = initialize_lora_filet_weights(
                kwargs["model"],
                dataloader,
                show_progress_bar=not args.disable_tqdm,
                **self._arguments,
            )
            self._done = weakref.ref(kwargs["model"])
        finally:
            if own:
                _end(dataloader)
                for generator, drawn in before:
                    generator.set_state(drawn)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A forward in eval mode repacks 4-bit weights on some CPUs, and a checkpoint comes next.
        unpack(kwargs["model"])


def _check_untrained(peft_model: Any, adapter_name: str) -> None:
    """ValueError for an adapter that is not where PEFT, or FILet, starts it: it would be lost."""
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    if config is None or config.init_lora_weights not in (True, "gaussian"):
        return  # said by the initialisation; of another start B may be anything
    targets = find_targets(peft_model, adapter_name)[0]
    less = (
        whole(its.B.trained).detach() + whole(its.B.start)  # of [B, −B0]
        if isinstance(its.B, StartedFactor)
        else its.B.weight
        for its in targets.values()
    )
    moved = values(over_shards(less, lambda rows, _: rows.count_nonzero()))
    for name, number in zip(targets, moved, strict=True):
        if number:
            raise ValueError(
                f"adapter {adapter_name!r} was trained (lora_B of {name} is not where it starts), "
                "and FiletInitCallback would start it anew; expected a new adapter, or a Trainer "
                "without the callback"
            )


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
