"""Moments → energies → directions → A and B: the choice for every layer, made in one place.

Both engines choose by :func:`choose`. It reads weights and moments and writes nothing.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from filet.config import FiletConfig
from filet.distributed.exchange import spread
from filet.distributed.group import Group
from filet.model.blocks import blocks
from filet.model.gathered import with_weights
from filet.model.targets import Target
from filet.report.modules import ModuleReport
from filet.system.text import some
from filet.system.transfer import Staging, values
from filet_kernels import (
    Moments,
    SecondMoment,
    contrast_directions,
    fisher_energies,
    lora_factors,
    select,
)

__all__ = [
    "Choice",
    "Divided",
    "Layer",
    "check_contrast_rank",
    "check_rank",
    "choose",
    "choose_together",
    "warn_of",
]

# The first gradients of B are in proportion to A's rows. With those of LoRA's default, 3^-½ long,
# small models have 1e-5 an entry and more (tests/test_magnitude.py): at 1e-4 of it they are below
# Adam's ε, 1e-8.
_FAINT = 1e-4 * 3**-0.5

# Of the largest λ of data to keep, below which a direction is rounding of the sums: its share of
# the task is nothing, and so is the gradient of its column of B. With 3 tokens and r = 8 five were
# at 1e-7, and of a pooler that saw 2 samples two of four at 2e-6.
_ROUNDING = 1e-5

_AHEAD = 7  # modules whose energies a GPU computes while the host chooses: a block's


@dataclass(eq=False)
class Layer:
    """What was chosen for a layer: its factors, in the dtype in which the adapter stores them."""

    A0: Tensor  # (r, n)
    B0: Tensor | None  # (m, r); None where B starts at 0
    fingerprint: str  # of the base weight


@dataclass(eq=False)
class Choice:
    """What was chosen for some layers, in their order.

    Attributes:
        layers: module → its factors.
        reports: module → its energies and directions.
        left_default: module → why nothing was chosen for it.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    reports: dict[str, ModuleReport] = field(default_factory=dict)
    left_default: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Divided:
    """Modules whose energies several processes compute, each of some columns of W.

    Attributes:
        group: the processes.
        targets: the modules, with their weights on every rank.
        columns: module → rank → its columns. These ranks have the sums; the first one chooses.
    """

    group: Group
    targets: Mapping[str, Target]
    columns: Mapping[str, Mapping[int, slice]]

    @property
    def mine(self) -> dict[str, slice]:
        rank = self.group.rank
        return {name: its[rank] for name, its in self.columns.items() if rank in its}

    def joined(self, energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The energies of all columns, given this rank's, on the CPU. Collective."""
        said = self.group.exchanged(dict(energies))
        return {
            name: torch.cat([said[rank][name] for rank in its])
            for name, its in self.columns.items()
        }


def choose(
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    shared_input: Mapping[str, str],
    fingerprints: Mapping[str, str],
    config: FiletConfig,
    keep: Mapping[str, SecondMoment] | None = None,
    owners: Mapping[str, int] | None = None,
    rank: int = 0,
    divided: Divided | None = None,
) -> Choice:
    """The r directions of every target, and A0, B0; no B0 for ``config.start="zero"``.

    By :func:`filet_kernels.fisher_energies`, or :func:`filet_kernels.contrast_directions`.

    Args:
        targets: layers with their weights, which are read.
        moments: of their names. A target without any saw no token (an expert, say).
        shared_input: module → the module whose input moment it shares, for the report.
        fingerprints: module → hash of its weight.
        config: uses ``start``, ``normalization``, ``gamma``, ``select`` (no "auto" any more),
            ``scaling``, ``orthogonal``, ``damping`` and ``seed``.
        keep: of "contrast", the input moments of data to keep.
        owners, rank: the targets that this rank owns are chosen for, by default all. Of a sharded
            model, whose weights are gathered, collective.
        divided: of which modules the energies are computed with others: then collective as well,
            for a model that is not sharded.

    Returns:
        :class:`Choice`; A0 and B0 on the weights' devices, energies and indices on the CPU.
    """
    choice = Choice()
    everyone = dict.fromkeys(targets, rank) if owners is None else owners
    for mine in with_weights(targets, everyone, rank):
        part = _chosen(mine, moments, shared_input, fingerprints, config, keep, divided)
        choice.layers |= part.layers
        choice.reports |= part.reports
        choice.left_default |= part.left_default
    return choice


def _chosen(
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    shared_input: Mapping[str, str],
    fingerprints: Mapping[str, str],
    config: FiletConfig,
    keep: Mapping[str, SecondMoment] | None,
    divided: Divided | None,
) -> Choice:
    """:func:`choose` for targets whose weights are whole."""
    choice = Choice()
    tokens = _tokens(targets, moments)
    choice.left_default = {name: why for name, both in tokens.items() if (why := _unseen(*both))}
    seen = {name: target for name, target in targets.items() if name not in choice.left_default}
    kept: dict[str, int] = {}
    if config.select == "contrast":
        assert keep is not None  # said by resolved()
        kept = dict(zip(seen, values([keep[name].count for name in seen]), strict=True))
        chosen = _by_contrast(seen, moments, keep, config)
    else:
        chosen = _by_energy(seen, moments, config, divided)
    for name, energies, indices, A0, B0 in chosen:
        target, its = targets[name], moments[name]
        choice.layers[name] = Layer(A0, B0, fingerprints[name])
        choice.reports[name] = ModuleReport(
            name=name,
            shape=its.shape,
            rank=target.rank,
            energies=energies,
            indices=indices,
            kind="contrast" if config.select == "contrast" else "energy",
            input_space=its.input.space,
            output_space=its.output.space,
            input_tokens=tokens[name][0],
            output_tokens=tokens[name][1],
            shared_input=shared_input.get(name),
            keep_tokens=kept.get(name),
        )
    return choice


def choose_together(
    group: Group,
    owners: Mapping[str, int],
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    shared_input: Mapping[str, str],
    fingerprints: Mapping[str, str],
    config: FiletConfig,
    keep: Mapping[str, SecondMoment] | None = None,
) -> Choice:
    """:func:`choose` by several processes: each for the layers it owns, the same result on all.

    A decomposition rounds differently on another machine, and a rounding can change a choice: so
    everything is computed once, and A0, B0 go to the others to the bit. Collective.

    ``owners``: module → its rank. The rest as in :func:`choose`.
    """
    choice = choose(targets, moments, shared_input, fingerprints, config, keep, owners, group.rank)
    said = group.exchanged((choice.reports, choice.left_default))
    reports = {name: report for reports, _ in said for name, report in reports.items()}
    left = {name: why for _, left in said for name, why in left.items()}
    work, units = [], []
    for names in blocks({name: targets[name] for name in targets if name in reports}).values():
        for owner in sorted({owners[name] for name in names}):
            its = [name for name in names if owners[name] == owner]
            described = [form for name in its for form in _forms(targets[name], config)]
            layers = [choice.layers[name] for name in its] if owner == group.rank else []
            tensors = [factor for layer in layers for factor in _factors(layer)]
            units.append(its)
            work.append((owner, described, tensors))
    factors: dict[str, list[Tensor]] = {}
    sides = 2 if config.start == "untouched" else 1
    for its, tensors in zip(units, spread(group, work), strict=True):
        for index, name in enumerate(its):
            factors[name] = tensors[index * sides : (index + 1) * sides]
    return Choice(
        {
            name: Layer(factors[name][0], next(iter(factors[name][1:]), None), fingerprints[name])
            for name in targets
            if name in factors
        },
        {name: reports[name] for name in targets if name in reports},
        {name: left[name] for name in targets if name in left},
    )


def _factors(layer: Layer) -> list[Tensor]:
    return [layer.A0] if layer.B0 is None else [layer.A0, layer.B0]


def _forms(
    target: Target, config: FiletConfig
) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """What :func:`_factors` of this target will be."""
    (m, n), rank, device = target.shape, target.rank, target.device
    A = ((rank, n), target.dtype, device)
    return [A, ((m, rank), target.dtype, device)] if config.start == "untouched" else [A]


# Of a module: its name, energies and indices for the report, and A0, B0.
_Chosen = tuple[str, Tensor, Tensor, Tensor, Tensor | None]


def _by_energy(
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    config: FiletConfig,
    divided: Divided | None,
) -> Iterator[_Chosen]:
    """The candidate directions of W by their Fisher energies."""
    assert config.select != "auto" and config.select != "contrast"
    for name, energies, weight in _energies(targets, moments, config, divided):
        target = targets[name]
        indices = select(energies, target.rank, config.select, seed=config.seed)
        A0, B0 = lora_factors(
            target.weight if weight is None else weight,
            energies,
            indices,
            scaling=config.scaling,
            gamma=config.gamma if config.normalization == "relative" else None,
            orthogonal=config.orthogonal,
            dtype=target.dtype,
        )
        # B0 is one of two thin products; what it costs to choose lies in the energies.
        yield name, energies, indices, A0, None if config.start == "zero" else B0


def _by_contrast(
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    keep: Mapping[str, SecondMoment],
    config: FiletConfig,
) -> Iterator[_Chosen]:
    """Directions of task against keep, solved once for modules that share both moments.

    A = √γ · rows of length 1, B = √γ · columns of W Aᵀ of length 1.
    """
    root = config.gamma**0.5
    sides = _Sides()
    solved: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    for name, target in targets.items():
        task, rank, device = moments[name].input, target.rank, target.device
        key = (id(task), id(keep[name]), rank)
        # What is solved in space "y" is W's own; nobody shares it.
        if key not in solved:
            try:
                rows, values = contrast_directions(
                    target.weight,
                    sides.one(task, device),
                    sides.one(keep[name], device),
                    rank,
                    damping=config.damping,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            solved = {key: (rows, values.cpu())}  # who shares it comes next
        rows, values = solved[key]
        A0, B0 = (root * rows).to(device, target.dtype), None
        if config.start == "untouched":
            columns = target.weight.double() @ rows.to(device).T
            lengths = torch.linalg.vector_norm(columns, dim=0)
            B0 = (columns * (root / torch.where(lengths > 0, lengths, 1))).to(target.dtype)
        indices = torch.arange(rank, device="cpu")
        yield name, values.clone(), indices, A0, B0  # one file has all of them


def _tokens(
    targets: Mapping[str, Target], moments: Mapping[str, Moments]
) -> dict[str, tuple[int, int]]:
    """How many tokens each side of each target's moments counted."""
    there = [name for name in targets if name in moments]
    counts = values(
        [side.count for name in there for side in (moments[name].input, moments[name].output)]
    )
    found = dict(zip(there, zip(counts[::2], counts[1::2], strict=True), strict=True))
    return {name: found.get(name, (0, 0)) for name in targets}


def _unseen(inputs: int, outputs: int) -> str | None:
    """Why moments of so many tokens on either side choose nothing, or None."""
    if not inputs:
        return "it saw no token"
    return None if outputs else "no gradient reached it"


def _energies(
    targets: Mapping[str, Target],
    moments: Mapping[str, Moments],
    config: FiletConfig,
    divided: Divided | None,
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each module's energies, on the CPU; a GPU computes the next modules' in the meantime.

    And its weight, if that is a view: one that was dequantised is not held so long. What several
    processes compute is exchanged when the GPU has been given everything else.
    """
    under_way: deque[_Energies] = deque()
    wholes = dict(targets)
    parts: dict[str, slice] = {}
    if divided is not None:
        wholes = {name: its for name, its in targets.items() if name not in divided.columns}
        parts = divided.mine
    sizes = {name: target.shape[1] for name, target in wholes.items()}
    sizes |= {name: columns.stop - columns.start for name, columns in parts.items()}
    places: dict[str, Tensor] = {}
    sides = _Sides()
    if torch.cuda.is_initialized():
        # In one piece: an allocation of pinned memory may wait for all that a GPU does.
        pinned = torch.empty(
            sum(sizes.values()), dtype=torch.float64, device="cpu", pin_memory=True
        )
        places = dict(zip(sizes, pinned.split(list(sizes.values())), strict=True))

    def begun(name: str, target: Target, columns: slice) -> _Energies:
        return _begun(target, moments[name], config, columns, places.get(name), sides)

    of_parts = {}
    if divided is not None:  # the others wait for these
        of_parts = {name: begun(name, divided.targets[name], its) for name, its in parts.items()}
    for name, target in wholes.items():
        under_way.append(begun(name, target, slice(None)))
        if divided is None and len(under_way) > _AHEAD:
            yield under_way.popleft().arrived()
    if divided is not None:
        known = divided.joined({name: its.arrived()[1] for name, its in of_parts.items()})
        for name, its in of_parts.items():
            if name in targets:
                yield name, known[name], its.view
    while under_way:
        yield under_way.popleft().arrived()


@dataclass(eq=False)
class _Energies:
    """Energies of a module on their way to the CPU."""

    name: str
    energies: Tensor
    event: torch.cuda.Event | None
    view: Tensor | None

    def arrived(self) -> tuple[str, Tensor, Tensor | None]:
        energies = self.energies
        if self.event is not None:
            self.event.synchronize()
            energies = energies.clone()  # the report's, without the pinned piece around it
        return self.name, energies, self.view


def _begun(
    target: Target,
    moments: Moments,
    config: FiletConfig,
    columns: slice,
    place: Tensor | None,
    sides: _Sides,
) -> _Energies:
    weight = target.weight
    energies = fisher_energies(
        weight,
        sides.of(moments, weight.device),
        normalization="sum" if config.normalization == "sum" else "mean",
        columns=columns,
    )
    event = None
    if energies.is_cuda:
        assert place is not None
        with torch.cuda.device(energies.device):
            energies = place.copy_(energies, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
    return _Energies(target.name, energies, event, None if target.values.quantised else weight)


class _Sides:
    """Moments on the device of a weight. Those of a file, or of several passes, are on the CPU."""

    def __init__(self) -> None:
        self._staging: Staging | None = None
        self._input: tuple[SecondMoment, SecondMoment] | None = None  # the last, and where it went

    def of(self, moments: Moments, device: torch.device) -> Moments:
        if moments.input.sum.device == device == moments.output.sum.device:
            return moments
        last = self._input  # who shares an input comes next
        if last is None or last[0] is not moments.input or last[1].sum.device != device:
            self._input = last = None  # before the next one has its memory
            self._input = last = moments.input, self.one(moments.input, device)
        return Moments(
            last[1],
            self.one(moments.output, device),
            moments.shape,
            moments.loss_terms.to(device),
        )

    def one(self, side: SecondMoment, device: torch.device) -> SecondMoment:
        if side.sum.device.type == "cpu" and device.type == "cuda":
            self._staging = self._staging or Staging()
            total = self._staging.copied(side.sum, device)
        else:
            total = side.sum.to(device)
        return dataclasses.replace(side, sum=total, count=side.count.to(device))


def check_rank(target: Target, candidates: int) -> None:
    """ValueError for a rank above the number of candidate directions, W's non-zero columns."""
    shape = target.shape
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


def check_contrast_rank(targets: Mapping[str, Target]) -> None:
    """ValueError for a rank above the smaller side of W: a product B A has no more."""
    for name, target in targets.items():
        if target.rank > min(target.shape):
            raise ValueError(
                f"{name}: rank {target.rank} exceeds the {min(target.shape)} that a product B A "
                f"of W's shape {target.shape} can have; expected a smaller r, or rank_pattern for "
                "this module"
            )


def warn_of(
    left_default: Mapping[str, str],
    layers: Mapping[str, Layer],
    reports: Mapping[str, ModuleReport],
) -> None:
    """Warnings of modules that keep PEFT's initialisation, and of what says nothing of a module.

    That is directions without energy or with next to none, data to keep that never came there, and
    data of the task that have fewer directions than are wanted.
    """
    if left_default:
        shown = [f"{name} ({reason})" for name, reason in left_default.items()]
        warnings.warn(
            f"{len(left_default)} modules keep PEFT's default LoRA initialisation: {some(shown)}",
            stacklevel=4,
        )
    unkept = [name for name in layers if reports[name].keep_tokens == 0]
    if unkept:
        warnings.warn(
            f"no token of the data to keep reached {len(unkept)} modules, so that theirs are the "
            f"task's principal directions, whatever is forgotten by them: {some(unkept)}; expected "
            "data to keep that runs all of the model (images too, say)",
            stacklevel=4,
        )
    unused = {
        name: int((its.energies <= _ROUNDING * its.energies.max()).sum())
        for name in layers
        if (its := reports[name]).kind == "contrast"
    }
    short = [f"{name} ({n} of {reports[name].rank})" for name, n in unused.items() if n]
    if short:
        warnings.warn(
            f"the task's data have fewer directions than the rank in {len(short)} modules, so that "
            f"some that were chosen say nothing and hardly train: {some(short)}; expected more "
            "samples, or a smaller rank there",
            stacklevel=4,
        )
    lengths = values([_least(layer) for layer in layers.values()])
    dead = [name for name, length in zip(layers, lengths, strict=True) if length == 0]
    if dead:
        expected = "normalization='relative', more samples, a float32 adapter, or another scaling"
        if reports[dead[0]].kind == "contrast":
            expected = "a larger gamma, a float32 adapter"
        warnings.warn(
            f"{some(dead)}: some chosen directions have no energy at all (or less than the "
            "adapter's dtype can hold), so their rows of A and columns of B are zero and will not "
            f"train; expected {expected}",
            stacklevel=4,
        )
    faint = {n: length for n, length in zip(layers, lengths, strict=True) if 0 < length < _FAINT}
    if faint:
        warnings.warn(
            f"{some(list(faint))}: some rows of A are {min(faint.values()):.1g} long, where LoRA's "
            f"are {3**-0.5:.2f}, so that gradients are below Adam's ε and the adapter hardly "
            "trains at first; expected normalization='relative' and a gamma near 1/3 or above it",
            stacklevel=4,
        )


def _least(layer: Layer) -> Tensor:
    """The length of the shortest direction, A's row or B's column, whichever is longer.

    () float64 on the layer's device.
    """
    # In float64 squares of what float32 can hold are in range.
    lengths: Tensor = torch.linalg.vector_norm(layer.A0, dim=1, dtype=torch.float64)
    if layer.B0 is not None:
        columns = torch.linalg.vector_norm(layer.B0, dim=0, dtype=torch.float64)
        lengths = torch.maximum(lengths, columns)
    return lengths.min()
