"""The public calls: an adapter initialised from data, from statistics, or for a folder's model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel

from filet.adapter.saved import write_folder
from filet.adapter.write import commit, materialise_rest
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import Engine, choose_engine, empty_model
from filet.blockwise.weights import ShardedWeights
from filet.collect.statistics import Statistics, check_statistics, statistics_of
from filet.config import FiletConfig, checked_config
from filet.loss.batch import ForwardFn
from filet.model.folder import load_model
from filet.model.inputs import check_dataloader
from filet.model.targets import Target, adapted, check_init, checked_targets
from filet.report.report import FiletReport
from filet.select import check_rank, choose, warn_of
from filet.system.memory import named_shortage, peak_memory
from filet.system.transfer import values

__all__ = [
    "apply_statistics",
    "check_applicable",
    "initialize_folder",
    "initialize_lora_filet_weights",
]


def initialize_lora_filet_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Any],
    config: FiletConfig | None = None,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
) -> FiletReport:
    """Initialise a LoRA adapter with FILet (arXiv 2605.01046, Algorithm 1), in place.

    Runs ``config.samples`` samples forward and backward, and gives every target module the r
    directions of least Fisher energy,
        A0 = diag(E_I)^½ V̂_Iᵀ,  B0 = Û_I diag(E_I)^½,
    from which A and B train, the layer being W x + s (B A − B0 A0) x with PEFT's scaling s. So the
    model's function stays what it was, and its base weights do, to the bit: the paper's W_res = W −
    s B0 A0 is left in two parts (:func:`filet.write_residual` joins them).

    Args:
        peft_model: what ``get_peft_model(model, LoraConfig(...))`` returned (any rank, alpha,
            patterns, rslora; A and B may be on the meta device). Its adapter is overwritten once
            everything has succeeded; on an exception or Ctrl-C the model is what it was. To PEFT
            the adapter is of rank 2r then, one half of it frozen (docs/adapters.md).
        dataloader, forward_fn, show_progress_bar: see :func:`filet.collect_statistics`.
        config: :class:`FiletConfig`, the paper's settings by default.
        adapter_name: which adapter.

    Returns:
        :class:`FiletReport`: energies, choices and errors by module, times, peak memory.

    Raises:
        As :func:`filet.collect_statistics` and :func:`filet.apply_statistics`.
    """
    config = checked_config(config)
    # What is refused is refused before the pass.
    with named_shortage("checks", _checks):
        targets, unsupported = check_applicable(peft_model, adapter_name)
    statistics = statistics_of(
        peft_model, targets, dataloader, config, adapter_name, forward_fn, show_progress_bar
    )
    with named_shortage("selection", _selection):
        return _apply(peft_model, targets, unsupported, statistics, config, adapter_name)


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
    config = checked_config(config)
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics is a {type(statistics).__name__}; expected filet.Statistics, which "
            "Statistics.load(path) reads"
        )
    with named_shortage("checks", _checks):
        targets, unsupported = check_applicable(peft_model, adapter_name)
        check_statistics(statistics, targets)
    with named_shortage("selection", _selection):
        return _apply(peft_model, targets, unsupported, statistics, config, adapter_name)


def _checks() -> str:
    return "the checks of the weights"


def _selection() -> str:
    return "the selection of directions and the writing of weights"


def check_applicable(
    peft_model: PeftModel, adapter_name: str
) -> tuple[dict[str, Target], dict[str, str]]:
    """The adapter's targets, after every check that needs no data, and why the others are none."""
    targets, unsupported = checked_targets(peft_model, adapter_name)
    counts = values(
        [
            torch.count_nonzero(torch.linalg.vector_norm(target.weight, torch.inf, dim=0))
            for target in targets.values()
        ]
    )
    for target, candidates in zip(targets.values(), counts, strict=True):
        check_rank(target, candidates)
    return targets, unsupported


def _apply(
    peft_model: PeftModel,
    targets: dict[str, Target],
    unsupported: dict[str, str],
    statistics: Statistics,
    config: FiletConfig,
    adapter_name: str,
) -> FiletReport:
    start = time.perf_counter()
    choice = choose(
        targets, statistics.moments, statistics.shared_input, statistics.fingerprints, config
    )
    if not choice.layers:
        raise ValueError(
            f"no module of adapter {adapter_name!r} saw a token and its gradient; expected data "
            "that reaches at least one of them"
        )
    selected = time.perf_counter()
    commit(peft_model, adapter_name, targets, choice.layers)
    materialise_rest(peft_model, adapter_name, config.seed)
    written = time.perf_counter()
    devices = {place for t in targets.values() if (place := t.base.weight.device).type == "cuda"}
    left_default = unsupported | choice.left_default
    warn_of(left_default, choice.layers)
    return FiletReport(
        modules=choice.reports,
        left_default=left_default,
        seconds={
            "statistics": statistics.seconds,
            "selection": selected - start,
            "writing": written - selected,
        },
        peak_memory=max(statistics.peak_memory, peak_memory(devices)),
        samples=statistics.samples,
        tokens=statistics.tokens,
        loss_terms=statistics.loss_terms,
        config={**dataclasses.asdict(config), "fisher": statistics.fisher},
    )


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
) -> FiletReport:
    """Initialise a LoRA adapter with FILet for the model in a folder, and write it to another.

    The result is what :func:`filet.initialize_lora_filet_weights` and :func:`filet.save_as_lora`
    give; ``filet.load(base_model, output)`` trains on it. With ``engine="blockwise"`` the model is
    never whole in memory: its blocks come from the safetensors shards one by one, twice. A run that
    was killed goes on at its last finished block when it is called again with the same arguments:
    it keeps its state in ``<output>.filet-run`` until the adapter is written.

    Args:
        model: local folder of a causal language model: config.json and safetensors weights, one
            for every weight of the model.
        batches: dicts of ``input_ids``, ``labels``, and what else the model takes
            (``attention_mask``, ``position_ids``), each a CPU tensor of (samples, tokens). Read to
            ``config.samples``. What goes through a block at once is one batch.
        output: folder to create, with the adapter and ``filet_report.safetensors``.
        lora_config: :class:`peft.LoraConfig`: rank, alpha, patterns, rslora, targets. The blockwise
            engine takes layers inside the blocks only, and nothing to save besides.
        config: :class:`FiletConfig`, the paper's settings by default. The blockwise engine computes
            the loss itself, the cross-entropy of the next token: ``loss_reduction`` has no use.
        engine: "memory" loads the whole model onto ``device``; "blockwise" never does; "auto" takes
            "memory" where weights and statistics fit there with room to spare.
        dtype: of the weights in memory, "auto" for what the folder says.
        device: where to compute; a GPU if there is one, by default.
        host_memory: bytes of host memory for block inputs and gradients; half of what is available
            by default. What does not fit goes to ``scratch``, or is recomputed.
        scratch: folder on a fast disk for block inputs; 90 % of what is free there may be used.
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace an adapter that is at ``output``.
        show_progress_bar: also says the plan beforehand: GPU and host memory, disk, time.

    Returns:
        :class:`FiletReport`, which is also in the folder. ``seconds`` are of this call: a resumed
        one does less.

    Deterministic: bitwise the same for the same arguments on the same machine, killed or not.

    Raises:
        TypeError: ``batches`` are none.
        ValueError: an argument that does not fit, a batch among them; a model of another task, or
            with a weight that no file has; a model that the blockwise engine does not do
            (quantised, no safetensors, blocks that hand on more than one tensor or share weights;
            targets outside the blocks), before any block is computed; a run folder of other data
            or settings, naming the first difference.
        FloatingPointError: NaN or infinity, naming the module.
        OutOfMemoryError: naming what was asked for and what to change.
        OSError: a full disk, say. What was finished stays, and the same call goes on there.
    """
    config = checked_config(config)
    check_dataloader(batches, "batches")
    if engine not in ("auto", "memory", "blockwise"):
        raise ValueError(f"engine={engine!r}; expected 'auto', 'memory' or 'blockwise'")
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config is a {type(lora_config).__name__}; expected a LoraConfig")
    check_init(lora_config)
    if host_memory is not None and host_memory < 1:
        raise ValueError(f"host_memory={host_memory}; expected a positive number of bytes")
    folder, output = Path(model), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise ValueError(f"output={str(output)!r} exists; expected overwrite=True to replace")
        if not (output / "adapter_config.json").is_file():
            raise ValueError(
                f"output={str(output)!r} holds no adapter; overwrite=True replaces only adapters"
            )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    if engine == "auto":
        engine = choose_engine(
            folder, lora_config, device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if engine == "memory":
        return _in_memory(
            folder, batches, output, lora_config, config, dtype, device, trust_remote_code,
            show_progress_bar,
        )  # fmt: skip
    whole = empty_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    run_folder = output.parent / f"{output.name}.filet-run"
    with contextlib.ExitStack() as stack:
        scratch_folder = None
        if scratch is not None:
            # One name for one run folder, which is locked: what a killed run has left there is
            # replaced, and nothing of another one.
            name = hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=6).hexdigest()
            scratch_folder = Path(scratch) / f"filet-scratch-{name}"
        run = stack.enter_context(
            Blockwise(
                whole,
                ShardedWeights(folder, whole),
                batches,
                lora_config,
                config,
                device=device,
                run_folder=run_folder,
                host_memory=host_memory,
                scratch=scratch_folder,
                show_progress_bar=show_progress_bar,
            )
        )
        run.sweep()
        report = run.write(output)
        run.discard()
    return report


def _in_memory(
    folder: Path,
    batches: Iterable[Mapping[str, Any]],
    output: Path,
    lora_config: LoraConfig,
    config: FiletConfig,
    dtype: Any,
    device: torch.device,
    trust_remote_code: bool,
    show_progress_bar: bool,
) -> FiletReport:
    base = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    peft_model = adapted(base, lora_config, config.seed)
    report = initialize_lora_filet_weights(
        peft_model, batches, config, show_progress_bar=show_progress_bar
    )
    write_folder(peft_model, report, output)
    return report
