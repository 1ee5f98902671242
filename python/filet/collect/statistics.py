"""Statistics of a model on a data set: taken once, applied to any rank and variant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from filet.collect.batches import Batches
from filet.collect.estimate import passes_by_size, passes_that_fit
from filet.collect.groups import collect_in_passes
from filet.collect.hooks import empty_moments
from filet.collect.keep import Keep, check_keep, collect_keep, kind_of, with_unseen
from filet.collect.probe import gpus_of
from filet.collect.shards import Shards
from filet.collect.together import Together, check_same_model
from filet.collect.written import write_alone, write_together
from filet.config import FiletConfig, checked_config
from filet.distributed.exchange import gathered
from filet.distributed.group import Group, current, joined
from filet.distributed.samples import share
from filet.loss.batch import ForwardFn
from filet.model.fingerprint import check_fingerprint, check_weights, fingerprints_of
from filet.model.isolation import preserved
from filet.model.sharded import units
from filet.model.targets import Target, checked_targets
from filet.system.memory import named_shortage, peak_memory
from filet.system.tensorset import metadata_of, opened
from filet_kernels import Moments, SecondMoment

__all__ = [
    "OF_PASS",
    "Statistics",
    "check_statistics",
    "collect_statistics",
    "moments_of_all",
    "settings_of",
    "statistics_of",
]

_FORMAT = "filet-statistics-1"


@dataclass(eq=False)
class Statistics:
    """Second moments of every target module, with what they belong to.

    Attributes:
        moments: module name (below the base model) → its :class:`filet_kernels.Moments`.
        fingerprints: module name → hash of the base weight they were taken with.
        shared_input: module → the module whose input moment it shares.
        samples, tokens, loss_terms: how much data they saw.
        data: the sum of a hash of each sample, the same however they are batched, ordered or
            divided between processes; 0 where it is not known.
        fisher: "empirical" or "sampled" labels.
        seconds, peak_memory: of the pass that took them.
        keep: module → the moment of its input on data that is not to be forgotten, in the space of
            its input moment and shared as that is; None where there was no such data.
        keep_samples, keep_tokens: how much of that they saw.
        keep_from: where it came from, "batches" or "the model itself, seed 0"; "" where there was
            none, and of files that do not say.
        owners: module → the rank that has its sums, where several processes took them together; on
            the others they are on the meta device (docs/distributed.md). None: all are here.
        shards: of a data set in parts, which these are of; None: of no part, or of all.
        settings: of the pass, :data:`OF_PASS`. Merged ones have those that both had alike, and no
            limit of samples; files that do not say have none.
    """

    moments: dict[str, Moments]
    fingerprints: dict[str, str]
    shared_input: dict[str, str]
    samples: int
    tokens: int
    loss_terms: int
    fisher: str
    seconds: float = 0.0
    peak_memory: int = 0
    path: str | None = field(default=None, repr=False)
    keep: dict[str, SecondMoment] | None = None
    keep_samples: int = 0
    keep_tokens: int = 0
    keep_from: str = ""
    owners: dict[str, int] | None = None
    shards: Shards | None = None
    data: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep is None:
            return
        if self.keep.keys() != self.moments.keys():
            raise ValueError("keep has moments of other modules; expected one for each")
        for name, moment in self.keep.items():
            mine = self.moments[name].input
            if moment.space != mine.space or moment.sum.shape != mine.sum.shape:
                raise ValueError(
                    f"{name}: keep is in space {moment.space!r} of size {len(moment.sum)}; "
                    f"expected {mine.space!r} of size {len(mine.sum)}, as the task's input moment"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; complete, or not there at all.

        A moment that several modules share is stored once. Sums keep their dtype; above the
        diagonal there are zeros. A copy is made of one moment at a time, in host memory.

        Statistics that several processes took together: all of them call this, and each writes
        what it owns, to name-00001-of-0000N.safetensors and so on; the first also
        name.safetensors.index.json. All or none are there, on a disk that all share. What ``path``
        was before, one file or several, is replaced.

        ValueError where the disk is not shared, or something of another kind has one of the names.
        """
        path = Path(path)
        if path.name.endswith(".index.json"):
            raise ValueError(f"{path}: expected the name of the statistics, not of their index")
        if self.owners is None:
            tensors, header = self._content(None)
            write_alone(path, tensors, header, _lower)
            return
        group = current()
        self.check_owners(group)
        with group or contextlib.nullcontext():
            tensors, header = self._content(0 if group is None else group.rank)
            if group is None:
                write_alone(path, tensors, header, _lower)
            else:
                write_together(group, path, tensors, header, _lower)

    def _content(self, rank: int | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a file (those that ``rank`` owns) and the text beside them (of all)."""
        tensors: dict[str, Tensor] = {}
        modules: dict[str, Any] = {}
        known: set[str] = set()
        for name, moments in self.moments.items():
            mine = rank is None or self.owners is None or self.owners[name] == rank
            keys = {}
            for side in ("input", "output"):
                moment: SecondMoment = getattr(moments, side)
                leader = self.shared_input.get(name, name) if side == "input" else name
                keys[side] = f"{leader}.{moment.space}"
                parts = [(keys[side], moment)]
                if side == "input" and self.keep is not None:
                    parts.append((f"{_KEEP}{keys[side]}", self.keep[name]))
                for key, part in parts:
                    if mine and key not in known:
                        tensors |= {f"{key}.sum": part.sum, f"{key}.count": part.count}
                    known.add(key)  # what several own is the first one's to write
            modules[name] = {**keys, "shape": moments.shape, "weight": self.fingerprints[name]}
        header = {
            "modules": modules,
            "shared_input": self.shared_input,
            **{key: getattr(self, key) for key in (*_COUNTS, *_OF_KEEP, "keep_from")},
            "data": f"{self.data:x}",
            "shards": self.shards and self.shards.as_json(),
            "settings": self.settings,
        }
        return tensors, {"format": _FORMAT, "statistics": json.dumps(header)}

    def whole(self) -> Statistics | None:
        """All of them, for a file, in the first process; None in the others.

        What the others own is in its host memory then. Collective where several processes took
        them together.
        """
        group = current()
        if self.owners is None:
            return self if group is None or group.rank == 0 else None
        self.check_owners(group)
        if group is None:
            return dataclasses.replace(self, owners=None)
        owned: dict[int, tuple[SecondMoment, int]] = {}
        for name, its in self.moments.items():
            kept = [] if self.keep is None else [self.keep[name]]
            for side in (its.input, its.output, *kept):
                owned.setdefault(id(side), (side, self.owners[name]))
        with group:
            group.settle()
            sums = gathered(group, [(owner, side.sum) for side, owner in owned.values()])
        if group.rank:
            return None
        new = {
            key: SecondMoment(side.space, sum_, side.count)
            for (key, (side, _)), sum_ in zip(owned.items(), sums, strict=True)
        }
        moments = {
            name: Moments(new[id(its.input)], new[id(its.output)], its.shape, its.loss_terms)
            for name, its in self.moments.items()
        }
        keep = self.keep and {name: new[id(its)] for name, its in self.keep.items()}
        return dataclasses.replace(self, moments=moments, keep=keep, owners=None)

    def check_owners(self, group: Group | None) -> None:
        """ValueError where the processes that took these statistics together are not there."""
        last = max((self.owners or {"": 0}).values())
        size = 1 if group is None else group.size
        if last >= size:
            raise ValueError(
                f"the statistics lie on {last + 1} processes or more, of which {size} are there; "
                "expected the torch.distributed group that took them, or a file that they saved"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Statistics:
        """Read what :meth:`save` wrote, in one process or by each of several.

        Of several files ``path`` is the name that they were saved by, or their index. ValueError,
        naming the file, where one is something else, missing, cut short, or of another run.
        """
        metadata = metadata_of(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: format {metadata.get('format')!r}; expected {_FORMAT!r}, a file that "
                "Statistics.save wrote"
            )
        with opened(path, device) as stored:
            tensors = dict(stored)
        header = json.loads(metadata["statistics"])
        loaded: dict[str, SecondMoment] = {}
        moments = {}

        def of(key: str) -> SecondMoment:
            if key not in loaded:
                space: Any = key.rpartition(".")[2]
                loaded[key] = SecondMoment(space, tensors[f"{key}.sum"], tensors[f"{key}.count"])
            return loaded[key]

        for name, module in header["modules"].items():
            m, n = module["shape"]
            moments[name] = Moments(
                of(module["input"]),
                of(module["output"]),
                (m, n),
                torch.tensor(header["loss_terms"], dtype=torch.int64, device=device),
            )
        return cls(
            moments,
            {name: module["weight"] for name, module in header["modules"].items()},
            header["shared_input"],
            **{key: header[key] for key in _COUNTS},
            data=int(header.get("data", "0"), 16),  # files of 0.1 have none
            path=str(path),
            keep={name: of(_KEEP + module["input"]) for name, module in header["modules"].items()}
            if header.get("keep_samples")
            else None,
            keep_samples=header.get("keep_samples", 0),  # files of 0.1 have neither
            keep_tokens=header.get("keep_tokens", 0),
            keep_from=header.get("keep_from", ""),
            shards=Shards.of_json(header.get("shards")),
            settings=header.get("settings", {}),
        )

    @classmethod
    def joined(cls, parts: Sequence[Statistics], seconds: float, peak_memory: int) -> Statistics:
        """Those of a whole model, given those of its parts on the same data, in one run."""
        whole: dict[str, Any] = {"moments": {}, "fingerprints": {}, "shared_input": {}}
        for part in parts:
            for key, values in whole.items():
                values.update(getattr(part, key))
        if any(part.keep is not None for part in parts):
            whole["keep"] = {name: m for part in parts for name, m in (part.keep or {}).items()}
        whole |= {"seconds": seconds, "peak_memory": peak_memory, "path": None}
        return dataclasses.replace(parts[0], **whole)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics over both data sets, as if one run had seen them all (to rounding).

        Data to keep adds up as the task's does; it may be that of one of the two only.

        ValueError, with the first difference named, where they are of different models or kinds, or
        of shards that do not belong together.
        """
        shards = Shards.merged(self.shards, other.shards)
        _compare(self, other.fingerprints, "the other statistics")
        if self.owners != other.owners:
            raise ValueError(
                "cannot merge statistics that lie on other processes than these; expected both in "
                "one process (save them, and load the files), or collected by the same processes"
            )
        if self.fisher != other.fisher:
            raise ValueError(
                f"cannot merge fisher={other.fisher!r} statistics into fisher={self.fisher!r} ones"
            )
        merged: dict[tuple[int, int], SecondMoment] = {}

        def both(mine: SecondMoment, theirs: SecondMoment) -> SecondMoment:
            key = (id(mine), id(theirs))
            if key not in merged:
                # One that never saw a token took its space without knowing whose input it shares.
                empty = mine.space != theirs.space and not int(mine.count)
                if empty or not int(theirs.count):
                    merged[key] = theirs if empty else mine
                else:
                    merged[key] = mine.merged(theirs)
            return merged[key]

        moments = {}
        for name, mine in self.moments.items():
            theirs = other.moments[name]
            moments[name] = Moments(
                both(mine.input, theirs.input),
                both(mine.output, theirs.output),
                mine.shape,
                mine.loss_terms + theirs.loss_terms.to(mine.loss_terms.device),
            )
        shared = {
            name: leader
            for name, leader in self.shared_input.items()
            if moments[name].input is moments[leader].input
        }
        keep = None
        if self.keep is not None or other.keep is not None:
            found = {}
            for name in self.moments:
                # Of a module that never saw a token of the task there may be one in another space,
                # of nothing.
                theirs_too = [
                    s.keep[name]
                    for s in (self, other)
                    if s.keep is not None and s.keep[name].space == moments[name].input.space
                ]
                if theirs_too:
                    found[name] = both(*theirs_too) if theirs_too[1:] else theirs_too[0]
            keep = with_unseen(found, moments)
        counts = {key: getattr(self, key) + getattr(other, key) for key in (*_SUMS, *_OF_KEEP)}
        sources = dict.fromkeys(each.keep_from for each in (self, other) if each.keep_samples)
        counts["keep_from"] = " and ".join(sources) if all(sources) else ""
        counts["data"] = self.data + other.data if self.data and other.data else 0
        counts |= {"fisher": self.fisher, "peak_memory": max(self.peak_memory, other.peak_memory)}
        return Statistics(
            moments, self.fingerprints, shared, **counts, keep=keep, owners=self.owners,
            shards=shards, settings=_alike(self.settings, other.settings),
        )  # fmt: skip


OF_PASS = ("samples", "token_mask", "loss_reduction", "share_inputs", "passes")
"""Settings by which statistics are taken, and which nothing asks for after that."""


def settings_of(config: FiletConfig) -> dict[str, Any]:
    """Those of :data:`OF_PASS`."""
    return {key: getattr(config, key) for key in OF_PASS}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What both have; no limit of samples, which each reached by itself."""
    both = {key: value for key, value in one.items() if (key, value) in other.items()}
    return {key: value for key, value in both.items() if key != "samples" or value is None}


_SUMS = ("samples", "tokens", "loss_terms", "seconds")
_COUNTS = (*_SUMS, "fisher", "peak_memory")
_OF_KEEP = ("keep_samples", "keep_tokens")
_KEEP = "keep:"  # before the name of a moment in a file: no module's begins so


def collect_statistics(
    peft_model: PeftModel,
    dataloader: Iterable[Any],
    config: FiletConfig | None = None,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
    keep: Keep | None = None,
) -> Statistics:
    """Take the second moments of an adapter's target modules on data.

    Args:
        peft_model: from ``get_peft_model``, with a LoRA adapter. The pass sees it as the adapter's
            training will begin: with the trained heads and tokens that belong to the adapter, and
            with other adapters where they are active beside it, but without what the layers add
            that are to be initialised. Their base weights are what the statistics belong to. The
            model comes back as it was (flags, gradients, hooks, random state), also after an
            exception.
        dataloader: batches, as dicts of the model's arguments with labels unless ``forward_fn``
            says otherwise. Positions with ``attention_mask`` 0 do not count; positions without a
            label do. ``num_items_in_batch`` is left out: the loss is summed, whatever divides it.
            Moved to the model's device. Read once, a generator will do.
        config: :class:`FiletConfig`; uses ``samples``, ``fisher``, ``seed``, ``loss_reduction``,
            ``share_inputs`` and ``passes``.
        adapter_name: whose target modules.
        forward_fn: ``forward_fn(model, batch)`` → an output with ``.loss``, the loss, or
            ``(loss, terms)``; ``model(**batch)`` by default.
        show_progress_bar: samples, tokens a second, time left.
        keep: batches of what is not to be forgotten, read as ``dataloader`` is; labels are not
            needed. They go through the model once more, forward only, for the moments of the
            targets' inputs. "self" is text drawn from the model itself: as many samples, of 256
            tokens. See docs/keep.md.

    Returns:
        :class:`Statistics`, on the devices of the modules, or in host memory where it took several
        passes; float32 sums (float64 for float64 weights) of at most min(m, n)² a side.

    A causal language model of transformers whose loss is the plain cross-entropy of its head never
    has logits of a whole batch (:mod:`filet.loss.chunked`); the logger "filet" says, at level INFO,
    why another model computes its own loss.

    Deterministic: bitwise the same for the same batches and seed on the same machine, and the same
    to rounding however the samples are batched or ordered.

    Where ``torch.distributed`` is initialised with several processes, all of them call this, each
    with a model of the same weights (DistributedDataParallel around it or not) and batches of its
    own. ``config.samples`` is of all of them together (docs/distributed.md).

    Raises:
        TypeError, ValueError: an argument that does not fit, or a batch (samples that are no
            batch, ids beyond the embeddings, labels beyond what the model predicts, sequences
            beyond its positions; with a ``forward_fn`` none of that is asked), or a loss of unknown
            reduction.
        FloatingPointError: NaN or infinity, naming the module and the batch.
        OutOfMemoryError: naming what was asked for, the batch and what to change; also before the
            pass, with ``passes="auto"``, where the moments of one block and what one sample was
            measured to need are more than the GPU has free. A warning says where the whole batch
            is likely to be.
    """
    group = None
    if dist.is_available() and dist.is_initialized():
        peft_model, group = joined(peft_model)
    with group or contextlib.nullcontext():
        config = checked_config(config)
        targets, _ = checked_targets(peft_model, adapter_name)
        return statistics_of(
            peft_model, targets, dataloader, config, adapter_name, forward_fn, show_progress_bar,
            keep, group,
        )  # fmt: skip


def statistics_of(
    peft_model: PeftModel,
    targets: dict[str, Target],
    dataloader: Iterable[Any],
    config: FiletConfig,
    adapter_name: str,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    keep: Keep | None,
    group: Group | None = None,
) -> Statistics:
    """:func:`collect_statistics` for an adapter whose targets are found and checked."""
    check_keep(keep, peft_model)
    with named_shortage("checks", lambda: "the hashing of the weights"):
        weights = fingerprints_of({name: target.values for name, target in targets.items()})
    together = None
    if group is not None:
        its = kind_of(keep)
        check_same_model(group, peft_model, targets, weights, config, adapter_name, keep=its)
        together = Together(group, targets, sharded=bool(units(peft_model)))
        show_progress_bar = show_progress_bar and group.rank == 0
    devices = set(gpus_of(peft_model))
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with preserved(peft_model, adapter_name, targets):
        mine = config
        if group is not None:
            dataloader, samples = share(group, dataloader, config.samples)
            mine = dataclasses.replace(config, samples=samples)
        batches = Batches(dataloader)
        passes = _passes(
            peft_model, targets, batches, mine, forward_fn, keep is not None, bool(devices), group
        )
        found, shared_input, counts = collect_in_passes(
            peft_model, targets, batches, mine, forward_fn, show_progress_bar, passes, together
        )
        place = "cpu" if passes > 1 else None
        moments = moments_of_all(targets, found, counts["loss_terms"], place)
        kept, kept_counts = None, {"samples": 0, "tokens": 0}
        if keep is not None:
            del batches  # they may be in host memory
            kept, kept_counts = collect_keep(
                peft_model, targets, keep, config, forward_fn, show_progress_bar, moments,
                shared_input, passes, together,
            )  # fmt: skip
    for device in devices:
        torch.cuda.synchronize(device)
    return Statistics(
        moments,
        weights,
        shared_input,
        samples=counts["samples"],
        tokens=counts["tokens"],
        loss_terms=counts["loss_terms"],
        data=counts["data"],
        fisher=config.fisher,
        settings=settings_of(config),
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(devices),
        keep=kept,
        keep_samples=kept_counts["samples"],
        keep_tokens=kept_counts["tokens"],
        keep_from=_source_of(keep, config),
        owners=None if together is None else {name: together.owners[name] for name in targets},
    )


def _passes(
    peft_model: PeftModel,
    targets: dict[str, Target],
    batches: Batches,
    config: FiletConfig,
    forward_fn: ForwardFn | None,
    keep: bool,
    gpus: bool,
    group: Group | None,
) -> int:
    """Over how many groups of blocks the moments are taken: what fits on every process."""
    passes = config.passes
    if passes == "auto" and gpus and units(peft_model):
        passes = passes_by_size(peft_model, targets, config, keep)
    elif passes == "auto":
        first = batches.first() if gpus else None
        passes = (
            1
            if first is None
            else passes_that_fit(peft_model, targets, first, config, forward_fn, keep)
        )
    return passes if group is None else max(group.exchanged(passes))


def _source_of(keep: Keep | None, config: FiletConfig) -> str:
    """Where data to keep come from."""
    if keep is None:
        return ""
    return f"the model itself, seed {config.seed}" if isinstance(keep, str) else "batches"


def moments_of_all(
    targets: dict[str, Target],
    found: dict[str, Moments],
    loss_terms: int,
    device: torch.device | str | None = None,
) -> dict[str, Moments]:
    """The moments of every target, in their order: empty for an expert that no token went to.

    Empty ones are on ``device``, by default on that of the weight.
    """
    moments = {}
    for name, target in targets.items():
        if name not in found:
            found[name] = empty_moments(target, device=device)
            found[name].loss_terms.fill_(loss_terms)
        moments[name] = found[name]
    return moments


def _lower(tensor: Tensor) -> None:
    """Zeros above the diagonal, where a sum is undefined."""
    if tensor.dim() == 2:
        tensor.tril_()


def check_statistics(statistics: Statistics, targets: dict[str, Target]) -> None:
    """ValueError naming the first difference where the statistics are of another model.

    Also where they are of some shards of a data set only.
    """
    if statistics.shards is not None:
        raise ValueError(
            f"{_of(statistics)} are of {statistics.shards} alone; expected those of all shards, as "
            "filet stats --merge (Statistics.merge) makes them"
        )
    missing = next((name for name in targets if name not in statistics.fingerprints), None)
    if missing is not None:
        raise ValueError(f"{_of(statistics)} have no module {missing!r}, a target of this adapter")
    weights = {name: target.values for name, target in targets.items()}
    check_weights(weights, statistics.fingerprints, f"{_of(statistics)} belong")


def _compare(statistics: Statistics, other: dict[str, str], what: str) -> None:
    for name, mine in statistics.fingerprints.items():
        theirs = other.get(name)
        if theirs is None:
            raise ValueError(f"{what} have no module {name!r}, which {_of(statistics)} have")
        check_fingerprint(name, theirs, mine, f"{_of(statistics)} belong", what)
    extra = next((name for name in other if name not in statistics.fingerprints), None)
    if extra is not None:
        raise ValueError(f"{_of(statistics)} have no module {extra!r}, which {what} have")


def _of(statistics: Statistics) -> str:
    return f"the statistics in {statistics.path}" if statistics.path else "the statistics"
