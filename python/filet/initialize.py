"""The public calls: an adapter initialised from data, from statistics, or for a folder's model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel

from filet.adapter.saved import write_folder
from filet.adapter.write import commit, materialise_rest
from filet.blockwise.engine import blockwise_run
from filet.blockwise.folder import Engine, checked_folder_arguments, choose_engine
from filet.collect.keep import Keep, check_keep_used, kind_of
from filet.collect.statistics import (
    OF_PASS,
    Statistics,
    check_statistics,
    collect_statistics,
    statistics_of,
)
from filet.collect.together import check_same_model, owners_by_block
from filet.collect.written import check_shared
from filet.config import FiletConfig, checked_config, resolved
from filet.distributed.group import Group, current, joined
from filet.loss.batch import ForwardFn
from filet.model.folder import load_adapted
from filet.model.targets import Target, candidates, checked_targets
from filet.report.report import FiletReport
from filet.select import (
    Choice,
    check_contrast_rank,
    check_rank,
    choose,
    choose_together,
    warn_of,
)
from filet.system.memory import named_shortage, peak_memory

__all__ = [
    "apply_statistics",
    "check_applicable",
    "initialize_folder",
    "initialize_lora_filet_weights",
    "save_whole",
]


def initialize_lora_filet_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Any],
    config: FiletConfig | None = None,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
    keep: Keep | None = None,
) -> FiletReport:
    """Initialise a LoRA adapter with FILet (arXiv 2605.01046, Algorithm 1), in place.

    Runs ``config.samples`` samples forward and backward, and gives every target module the r
    directions of least Fisher energy E as A, with B = 0:
        A = diag(c_I)^½ Qᵀ,  V̂_I = Q R,  c = γ E / mean(E_I).
    So the adapter is plain LoRA with another A. With ``config.start="untouched"`` it is the paper's
        A0 = diag(c_I)^½ V̂_Iᵀ,  B0 = Û_I diag(c_I)^½
    (with Q for V̂_I unless ``config.orthogonal`` is False), from which A and B train, the layer
    being W x + s (B A − B0 A0) x with PEFT's scaling s: the paper's W_res = W − s B0 A0 is left in
    two parts (:func:`filet.write_residual` joins them).
    Either way the model's function stays what it was, and its base weights do, to the bit.

    Args:
        peft_model: what ``get_peft_model(model, LoraConfig(...))`` returned (any rank, alpha,
            patterns, rslora; A and B may be on the meta device). Its adapter is overwritten once
            everything has succeeded; on an exception or Ctrl-C the model is what it was. With
            "untouched" the adapter is of rank 2r to PEFT, one half of it frozen
            (docs/adapters.md).
        dataloader, forward_fn, show_progress_bar: see :func:`filet.collect_statistics`.
        config: :class:`FiletConfig`. ``FiletConfig(start="untouched", normalization="mean",
            orthogonal=False)`` is the paper's, to the letter.
        adapter_name: which adapter.
        keep: batches of what is not to be forgotten, or "self", as in
            :func:`filet.collect_statistics`. With it the directions are those of largest task over
            data to keep instead (``select="contrast"``, docs/keep.md).

    Returns:
        :class:`FiletReport`: energies, choices and errors by module, times, peak memory.

    Where ``torch.distributed`` has several processes, all of them call this, each with batches of
    its own; A and B are the same on all, to the bit (docs/distributed.md).

    Raises:
        As :func:`filet.collect_statistics` and :func:`filet.apply_statistics`.
    """
    group = None
    if dist.is_available() and dist.is_initialized():
        peft_model, group = joined(peft_model)
    with group or contextlib.nullcontext():
        config = checked_config(config)
        targets, unsupported, config = check_before_pass(peft_model, config, adapter_name, keep)
        statistics = statistics_of(
            peft_model, targets, dataloader, config, adapter_name, forward_fn, show_progress_bar,
            keep, group,
        )  # fmt: skip
        with named_shortage("selection", _selection):
            return _apply(peft_model, targets, unsupported, statistics, config, adapter_name, group)


def _kept(statistics: Statistics) -> dict[str, Any]:
    """Of data to keep, for a report."""
    return {
        "samples": statistics.keep_samples,
        "tokens": statistics.keep_tokens,
        "from": statistics.keep_from,
    }


def apply_statistics(
    peft_model: PeftModel,
    statistics: Statistics,
    config: FiletConfig | None = None,
    adapter_name: str = "default",
) -> FiletReport:
    """Initialise a LoRA adapter from statistics taken before, without running the model.

    The same statistics serve every rank, selection and scaling. Arguments and result as in
    :func:`initialize_lora_filet_weights`.

    Raises:
        ValueError: statistics of another model (the first difference is named), a rank above the
            number of candidate directions, or base weights that PEFT has changed (a PiSSA adapter).
        OutOfMemoryError: naming what was asked for; the model is what it was.
    """
    group = None
    if dist.is_available() and dist.is_initialized():
        peft_model, group = joined(peft_model)
    with group or contextlib.nullcontext():
        config = checked_config(config)
        if not isinstance(statistics, Statistics):
            raise TypeError(
                f"statistics is a {type(statistics).__name__}; expected filet.Statistics, which "
                "Statistics.load(path) reads"
            )
        with named_shortage("checks", _checks):
            targets, unsupported = check_applicable(peft_model, adapter_name)
            config = _with_choice(config, statistics.keep is not None, targets)
            check_statistics(statistics, targets)
            if group is not None:
                check_same_model(
                    group, peft_model, targets, statistics.fingerprints, config, adapter_name,
                    **_identity(statistics),
                )  # fmt: skip
        with named_shortage("selection", _selection):
            return _apply(peft_model, targets, unsupported, statistics, config, adapter_name, group)


def _identity(its: Statistics) -> dict[str, object]:
    """What says which statistics they are, by its name in a message."""
    found: dict[str, object] = {
        "samples, tokens, loss_terms of the statistics": (its.samples, its.tokens, its.loss_terms),
        "keep_samples, keep_tokens, keep_from of the statistics": (
            its.keep_samples,
            its.keep_tokens,
            its.keep_from,
        ),
        "the hash of the statistics' samples": its.data,
    }
    for name in its.moments:
        shared = its.shared_input.get(name), None if its.owners is None else its.owners[name]
        found[f"whose input {name} shares, and its owner, of the statistics"] = shared
    return found


def check_before_pass(
    peft_model: PeftModel, config: FiletConfig, adapter_name: str, keep: Any
) -> tuple[dict[str, Target], dict[str, str], FiletConfig]:
    """What is refused is refused here; targets, why others are none, and the settings resolved.

    ``keep``: data to keep, as batches or not yet, or None.
    """
    check_keep_used(keep, config)
    with named_shortage("checks", _checks):
        targets, unsupported = check_applicable(peft_model, adapter_name)
        return targets, unsupported, _with_choice(config, keep is not None, targets)


def _with_choice(config: FiletConfig, keep: bool, targets: dict[str, Target]) -> FiletConfig:
    """The settings with the selection decided, which has directions enough for the targets."""
    config = resolved(config, keep)
    if config.select == "contrast":
        check_contrast_rank(targets)
    return config


def _checks() -> str:
    return "the checks of the weights"


def _selection() -> str:
    return "the selection of directions and the writing of weights"


def check_applicable(
    peft_model: PeftModel, adapter_name: str
) -> tuple[dict[str, Target], dict[str, str]]:
    """The adapter's targets, after every check that needs no data, and why the others are none."""
    targets, unsupported = checked_targets(peft_model, adapter_name)
    for target, number in zip(targets.values(), candidates(targets), strict=True):
        check_rank(target, number)
    return targets, unsupported


def _apply(
    peft_model: PeftModel,
    targets: dict[str, Target],
    unsupported: dict[str, str],
    statistics: Statistics,
    config: FiletConfig,
    adapter_name: str,
    group: Group | None,
) -> FiletReport:
    start = time.perf_counter()
    choice = _chosen(targets, statistics, config, group)
    if not choice.layers:
        raise ValueError(
            f"no module of adapter {adapter_name!r} saw a token and its gradient; expected data "
            "that reaches at least one of them"
        )
    selected = time.perf_counter()
    settled = None if group is None else group.settle
    commit(peft_model, adapter_name, targets, choice.layers, settled)
    materialise_rest(peft_model, adapter_name, config.seed)
    written = time.perf_counter()
    places = {layer.A0.device for layer in choice.layers.values()}
    devices = {place for place in places if place.type == "cuda"}
    left_default = unsupported | choice.left_default
    warn_of(left_default, choice.layers, choice.reports)
    seconds = {
        "statistics": statistics.seconds,
        "selection": selected - start,
        "writing": written - selected,
    }
    peak = max(statistics.peak_memory, peak_memory(devices))
    if group is not None:
        seconds, peak = group.from_first((seconds, peak))
    return FiletReport(
        modules=choice.reports,
        left_default=left_default,
        seconds=seconds,
        peak_memory=peak,
        samples=statistics.samples,
        tokens=statistics.tokens,
        loss_terms=statistics.loss_terms,
        data=statistics.data,
        keep=_kept(statistics) if config.select == "contrast" else {},
        config=_settings(config, statistics),
    )


def _settings(config: FiletConfig, statistics: Statistics) -> dict[str, Any]:
    """By which the statistics were taken, as far as they say, and the directions chosen."""
    said = {"fisher": statistics.fisher, **statistics.settings}
    known = {k: v for k, v in dataclasses.asdict(config).items() if k not in OF_PASS or k in said}
    return {**known, **said}


def _chosen(
    targets: dict[str, Target], statistics: Statistics, config: FiletConfig, group: Group | None
) -> Choice:
    """The choice for all targets, each made by the process that has its sums."""
    moments, shared = statistics.moments, statistics.shared_input
    hashes, keep = statistics.fingerprints, statistics.keep
    if statistics.owners is not None:
        statistics.check_owners(group)
    if group is None:
        return choose(targets, moments, shared, hashes, config, keep)
    owners = statistics.owners
    if owners is None:  # from a file: all have all of them, and share the work
        owners = owners_by_block(group, targets, shared)
    return choose_together(group, owners, targets, moments, shared, hashes, config, keep)


def initialize_folder(
    model: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    lora_config: LoraConfig,
    config: FiletConfig | None = None,
    *,
    engine: Engine = "auto",
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    host_memory: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
    keep: Keep | None = None,
    save_statistics: str | os.PathLike[str] | None = None,
    quantization_config: Any = None,
    task: str = "causal-lm",
) -> FiletReport:
    """Initialise a LoRA adapter with FILet for the model in a folder, and write it to another.

    The result is what :func:`filet.initialize_lora_filet_weights` and :func:`filet.save_as_lora`
    give; ``filet.load(base_model, output)`` trains on it. With ``engine="blockwise"`` the model is
    never whole in memory: its blocks come from the safetensors shards one by one, twice. A killed
    run, called again, goes on at its last finished block (``<output>.filet-run``), bit for bit.

    Args:
        model: local folder of a language model: config.json, and safetensors of all weights.
        batches: dicts of CPU tensors (samples, tokens): ``input_ids``, ``labels``, and what else
            the model takes, up to ``config.samples``. A block runs a batch at once.
        output: folder to create, with what :func:`filet.save_as_lora` writes with a report.
        lora_config: its targets to be inside the blocks where the engine is "blockwise".
        config: as in :func:`filet.initialize_lora_filet_weights`. The blockwise engine has no use
            for ``loss_reduction``: its loss is the cross-entropy of the next token.
        engine: "memory" has the whole model on ``device``; "auto" is that where it fits with room.
        dtype, device: of the weights ("auto": as the folder says); a GPU if there is one.
        host_memory: bytes on a machine for block inputs and gradients; half of what is available.
        scratch: folder on a fast disk for what does not fit there; 90 % of its room may be used.
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace an adapter that is at ``output``, and what is at ``save_statistics``.
        show_progress_bar: also says the plan beforehand: GPU and host memory, disk, time.
        keep: as in :func:`filet.initialize_lora_filet_weights`; blockwise batches only, no "self".
        save_statistics: a .safetensors file to write them to, for :func:`filet.apply_statistics`.
        quantization_config: transformers' ``BitsAndBytesConfig``, to quantise the model on loading.
        task: "causal-lm", or "vlm" (AutoModelForImageTextToText), with the blocks of its text.

    Raises:
        TypeError, ValueError: an argument or a batch that does not fit; before any block is
            computed, a model of another task, with a weight that no file has, or that the blockwise
            engine does not do (docs/blockwise.md); a run folder of other data or settings.
        FloatingPointError, OutOfMemoryError: naming the module, or what to change.
        OSError: a full disk, say. The same call goes on with what was finished.
    """
    folder, output = Path(model), Path(output)
    saved = None if save_statistics is None else Path(save_statistics)
    with current() or contextlib.nullcontext() as group:
        config, device = checked_folder_arguments(
            folder, batches, output, lora_config, config, engine, _own_device(group, device),
            host_memory, overwrite, saved, quantization_config, task,
        )  # fmt: skip
        how: Any = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        how |= {"task": task, "quantization_config": quantization_config}
        engine = _one_engine(group, engine, folder, lora_config, keep, output, saved, how)
        what = (folder, batches, output, lora_config, config, show_progress_bar)
        if engine == "memory":
            return _in_memory(*what, keep, saved, group, **how)
        return _by_blocks(*what, host_memory, scratch, keep, saved, group=group, **how)


def _own_device(group: Group | None, device: torch.device | str | None) -> Any:
    """The GPU that this process of several was given, where none is named, or just "cuda"."""
    unnamed = device is None or torch.device(device) == torch.device("cuda")
    if group is None or not unnamed or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _one_engine(
    group: Group | None,
    engine: Engine,
    folder: Path,
    lora_config: LoraConfig,
    keep: Keep | None,
    output: Path,
    saved: Path | None,
    how: dict[str, Any],
) -> Engine:
    """Which engine, of all processes; ValueError where they would go different ways. Collective."""
    if group is not None:
        to = {"output": str(output), "save_statistics": None if saved is None else str(saved)}
        group.check_same({"engine": engine, "keep": kind_of(keep), **to})
    if engine != "auto":
        return engine
    return choose_engine(folder, lora_config, keep=keep is not None, **how)


def _by_blocks(*what: Any, **how: Any) -> FiletReport:
    """By the blockwise engine. Arguments of :func:`blockwise_run`."""
    with blockwise_run(*what, **how) as run:
        run.sweep()
        return run.write(what[2])


def save_whole(statistics: Statistics, path: Path) -> None:
    """Write the statistics of all processes: what they took together each its part. Collective.

    What every process has, merged files say, the first one writes.
    """
    with current() or contextlib.nullcontext() as group:
        if group is None or group.rank == 0 or statistics.owners is not None:
            statistics.save(path)


def _in_memory(
    folder: Path,
    batches: Iterable[Mapping[str, Any]],
    output: Path,
    lora_config: LoraConfig,
    config: FiletConfig,
    show_progress_bar: bool,
    keep: Keep | None,
    save_statistics: Path | None,
    group: Group | None,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    trust_remote_code: bool,
    quantization_config: Any,
    task: str,
) -> FiletReport:
    peft_model = load_adapted(
        folder,
        lora_config,
        config.seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        quantization_config=quantization_config,
        task=task,
    )
    more: Any = {"show_progress_bar": show_progress_bar, "keep": keep}
    if save_statistics is None:
        report = initialize_lora_filet_weights(peft_model, batches, config, **more)
    else:
        check_before_pass(peft_model, config, "default", keep)
        check_shared(save_statistics)
        statistics = collect_statistics(peft_model, batches, config, **more)
        save_whole(statistics, save_statistics)
        report = apply_statistics(peft_model, statistics, config)
    if group is None or group.rank == 0:
        write_folder(peft_model, report, output)
    return report
