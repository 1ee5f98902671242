"""FILet initialisation of a PeftModel: statistics in, adapter and base weights out."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from filet.adapters import Layer, commit
from filet.checks import checked_config
from filet.config import FiletConfig
from filet.memory import named_shortage
from filet.report import FiletReport, ModuleReport
from filet.statistics import (
    Statistics,
    check_statistics,
    collect_statistics,
    peak_memory,
)
from filet.targets import Target, check_peft_model, check_targets, find_targets
from filet.transfer import values
from filet.walk import ForwardFn, some
from filet_kernels import Moments, SecondMoment, fisher_energies, lora_factors, select

__all__ = [
    "apply_statistics",
    "check_applicable",
    "check_rank",
    "initialize_lora_filet_weights",
    "materialise_rest",
    "nothing_seen",
    "warn_of",
]

_AHEAD = 7  # modules whose energies a GPU computes while the host chooses: a block's


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
        check_applicable(peft_model, adapter_name)
    statistics = collect_statistics(
        peft_model, dataloader, config, adapter_name, forward_fn, show_progress_bar
    )
    with named_shortage("selection", _selection):
        return _apply(peft_model, statistics, config, adapter_name)


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
        check_statistics(statistics, check_applicable(peft_model, adapter_name))
    with named_shortage("selection", _selection):
        return _apply(peft_model, statistics, config, adapter_name)


def _checks() -> str:
    return "the checks of the weights"


def _selection() -> str:
    return "the selection of directions and the writing of weights"


def check_applicable(peft_model: PeftModel, adapter_name: str) -> dict[str, Target]:
    """The adapter's targets, after every check that needs no data."""
    peft_model = check_peft_model(peft_model, adapter_name)
    targets, unsupported = find_targets(peft_model, adapter_name)
    check_targets(peft_model, targets, unsupported, adapter_name)
    counts = values(
        [
            torch.count_nonzero(torch.linalg.vector_norm(target.weight, torch.inf, dim=0))
            for target in targets.values()
        ]
    )
    for target, candidates in zip(targets.values(), counts, strict=True):
        check_rank(target, candidates)
    return targets


def check_rank(target: Target, candidates: int) -> None:
    """ValueError for a rank above the number of candidate directions, W's non-zero columns."""
    shape = tuple(target.weight.shape)
    if candidates == 0:
        raise ValueError(
            f"{target.name}: all of its weight {shape} is zero, so that it has no direction; "
            "expected the weights of a trained model, or target_modules without this module"
        )
    if target.rank > candidates:
        raise ValueError(
            f"{target.name}: rank {target.rank} exceeds its {candidates} candidate directions "
            f"(non-zero columns of W {shape}); expected a smaller r, or rank_pattern for this "
            "module"
        )


def _apply(
    peft_model: PeftModel,
    statistics: Statistics,
    config: FiletConfig,
    adapter_name: str,
) -> FiletReport:
    targets, unsupported = find_targets(peft_model, adapter_name)
    left_default = dict(unsupported)
    layers: dict[str, Layer] = {}
    reports: dict[str, ModuleReport] = {}
    start = time.perf_counter()
    sides = [(statistics.moments[n].input, statistics.moments[n].output) for n in targets]
    counts = values([side.count for both in sides for side in both])
    tokens = dict(zip(targets, zip(counts[::2], counts[1::2], strict=True), strict=True))
    left_default |= {n: why for n, both in tokens.items() if (why := nothing_seen(*both))}
    seen = {name: target for name, target in targets.items() if name not in left_default}
    for name, energies in _energies(seen, statistics, config):
        target, moments = targets[name], statistics.moments[name]
        indices = select(energies, target.rank, config.select, seed=config.seed)
        A, B = lora_factors(
            target.weight, energies, indices, scaling=config.scaling, dtype=target.dtype
        )
        layers[name] = Layer(A, B, statistics.fingerprints[name])
        reports[name] = ModuleReport(
            name=name,
            shape=moments.shape,
            rank=target.rank,
            energies=energies,
            indices=indices,
            input_space=moments.input.space,
            output_space=moments.output.space,
            input_tokens=tokens[name][0],
            output_tokens=tokens[name][1],
            shared_input=statistics.shared_input.get(name),
        )
    if not layers:
        raise ValueError(
            f"no module of adapter {adapter_name!r} saw a token and its gradient; expected data "
            "that reaches at least one of them"
        )
    selected = time.perf_counter()
    commit(peft_model, adapter_name, targets, layers)
    materialise_rest(peft_model, adapter_name, config.seed)
    written = time.perf_counter()
    devices = {t.weight.device for t in targets.values() if t.weight.device.type == "cuda"}
    warn_of(left_default, layers)
    return FiletReport(
        modules=reports,
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


def _energies(
    targets: dict[str, Target], statistics: Statistics, config: FiletConfig
) -> Iterator[tuple[str, Tensor]]:
    """Each module's energies, on the CPU; a GPU computes the next modules' in the meantime."""
    under_way: deque[tuple[str, Tensor, torch.cuda.Event | None]] = deque()
    sizes = {name: t.weight.shape[1] for name, t in targets.items() if t.weight.is_cuda}
    places: dict[str, Tensor] = {}
    if sizes:  # in one piece: an allocation of pinned memory may wait for all that a GPU does
        pinned = torch.empty(sum(sizes.values()), dtype=torch.float64, pin_memory=True)
        places = dict(zip(sizes, pinned.split(list(sizes.values())), strict=True))

    def arrived() -> tuple[str, Tensor]:
        name, energies, event = under_way.popleft()
        if event is not None:
            event.synchronize()
            energies = energies.clone()  # the report's, without the pinned piece around it
        return name, energies

    for name, target in targets.items():
        moments, weight = statistics.moments[name], target.weight
        energies = fisher_energies(
            weight, _moved(moments, weight.device), normalization=config.normalization
        )
        event = None
        if energies.is_cuda:
            with torch.cuda.device(weight.device):
                energies = places[name].copy_(energies, non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record()
        under_way.append((name, energies, event))
        if len(under_way) > _AHEAD:
            yield arrived()
    while under_way:
        yield arrived()


def nothing_seen(inputs: int, outputs: int) -> str | None:
    """Why moments of so many tokens on either side choose nothing, or None."""
    if not inputs:
        return "it saw no token"
    return None if outputs else "no gradient reached it"


def _moved(moments: Moments, device: torch.device) -> Moments:
    """The moments on the weight's device (statistics from a file are on the CPU)."""
    if moments.input.sum.device == device == moments.output.sum.device:
        return moments

    def moved(side: SecondMoment) -> SecondMoment:
        return dataclasses.replace(side, sum=side.sum.to(device), count=side.count.to(device))

    loss_terms = moments.loss_terms.to(device)
    return Moments(moved(moments.input), moved(moments.output), moments.shape, loss_terms)


def materialise_rest(peft_model: PeftModel, adapter_name: str, seed: int) -> None:
    """Give PEFT's default initialisation to adapter weights that are still on the meta device.

    Drawn on the CPU, so that the same seed gives the same on every device and no GPU's random state
    changes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer in peft_model.base_model.model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            device = next(layer.get_base_layer().parameters()).device  # experts have no weight
            if device.type == "meta":  # of a model that is never whole
                device = torch.device("cpu")
            drawn: list[nn.Parameter] = []
            for factors in (layer.lora_A, layer.lora_B):
                if adapter_name in factors and factors[adapter_name].weight.device.type == "meta":
                    drawn += factors[adapter_name].to_empty(device="cpu").parameters()
            for parameters in (layer.lora_embedding_A, layer.lora_embedding_B):
                if adapter_name in parameters and parameters[adapter_name].device.type == "meta":
                    old = parameters[adapter_name]
                    parameters[adapter_name] = nn.Parameter(
                        torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad
                    )
                    drawn.append(parameters[adapter_name])
            if drawn:
                layer.reset_lora_parameters(adapter_name, True)
            for parameter in drawn:
                parameter.data = parameter.data.to(device)


def warn_of(left_default: dict[str, str], layers: dict[str, Layer]) -> None:
    if left_default:
        shown = [f"{name} ({reason})" for name, reason in left_default.items()]
        warnings.warn(
            f"{len(left_default)} modules keep PEFT's default LoRA initialisation: {some(shown)}",
            stacklevel=4,
        )
    alive = values([(x.A0.any(1) | x.B0.any(0)).all() for x in layers.values()])
    dead = [name for name, flag in zip(layers, alive, strict=True) if not flag]
    if dead:
        warnings.warn(
            f"{some(dead)}: some chosen directions have no energy at all (or less than the "
            "adapter's dtype can hold), so their rows of A and columns of B are zero and will not "
            "train; expected more samples, a float32 adapter, or another scaling",
            stacklevel=4,
        )
