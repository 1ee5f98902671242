"""The moments of several processes, each over its own samples, made those of all samples.

Who holds a block or module has its sums afterwards; on the others they are on the meta device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from filet.collect.hooks import empty_moments
from filet.collect.in_step import InStep
from filet.config import FiletConfig
from filet.distributed.exchange import Square, balanced, reduced
from filet.distributed.group import Group
from filet.model.blocks import blocks
from filet.model.fingerprint import fingerprints
from filet.model.sharded import as_rows, local
from filet.model.targets import Target
from filet.system.transfer import values
from filet_kernels import Moments, SecondMoment
from filet_kernels.moments import Space

__all__ = [
    "Holders",
    "Together",
    "check_same_model",
    "columns_of",
    "holders_by_cost",
    "owners_by_block",
]


class Holders(Protocol):
    """Module → the ranks that have its sums. The first one owns the module: it chooses."""

    def __call__(
        self, targets: Mapping[str, Target], *, shared_input: Mapping[str, str]
    ) -> dict[str, tuple[int, ...]]: ...


# A product in float32's precision on tensor cores, as the forms of energies take, beside one of
# bf16, as the Gram matrix of W takes: by the times of Llama-3-70B's layers (docs/kernels.md).
_FORM = 12

# How much larger than an even share of a block a module's energies have to be to be divided: for
# each part another process has to have its moments.
_DIVIDED = 1.25

_TILE = 128  # columns of a kernel's tile


def check_same_model(
    group: Group,
    peft_model: PeftModel,
    targets: Mapping[str, Target],
    weights: Mapping[str, str],
    config: FiletConfig,
    adapter_name: str,
    **more: object,
) -> None:
    """ValueError in all processes where these are not the same in all, naming one. Collective.

    The adapter's own weights need not be: the pass runs without them, and they are overwritten.

    Args:
        weights: fingerprints of those of the targets.
        more: what else has to be the same, by its name in the message.
    """
    what: dict[str, object] = {
        f"FiletConfig.{name}": value for name, value in dataclasses.asdict(config).items()
    }
    what |= {"adapter_name": adapter_name, **more}
    for name, target in targets.items():
        what[f"the module {name} (rank, scaling, dtype of A, device)"] = (
            target.rank,
            target.scaling,
            str(target.dtype),
            target.device.type,
        )
        label = "kind" if target.values.quantised else "dtype"
        what[f"the weight of {name} ({label}:shape:hash)"] = weights[name]
    for name, found in fingerprints(_others(peft_model, targets)).items():
        what[f"{name} (dtype:shape:hash)"] = found
    what["the order of the modules"] = list(targets)
    group.check_same(what)


def _others(peft_model: PeftModel, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """What else the pass runs through: embeddings, norms, biases, heads; each as (m, n).

    Not tensors made of others, torchao's: those that are no target's are taken on trust.
    """
    known = {id(p) for t in targets.values() for n, p in t.base.named_parameters() if n != "bias"}
    return {
        name: as_rows(parameter)
        for name, parameter in peft_model.base_model.model.named_parameters()
        if id(parameter) not in known
        and "lora_" not in name
        and parameter.numel()
        and not is_traceable_wrapper_subclass(local(parameter))
    }


def owners_by_block(
    group: Group,
    targets: Mapping[str, Target],
    shared_input: Mapping[str, str],
    loads: list[int] | None = None,
) -> dict[str, int]:
    """Module → the rank that owns its block: its sums, and the choice for it.

    The same on every rank. Balanced by the bytes of the moments. Blocks whose modules share an
    input moment have one owner (the decoder blocks that all take one encoder's output).

    ``loads``: bytes that the ranks own already; mutated.
    """
    units = _joined(list(blocks(dict(targets)).values()), shared_input)
    sizes = []
    for names in units:
        sizes.append(0)
        for name in names:
            least = min(targets[name].shape)
            item = targets[name].sums[0].itemsize
            sizes[-1] += item * least**2 * (1 if name in shared_input else 2)
    owners = balanced(sizes, [0] * group.size if loads is None else loads)
    by_name = {n: owner for names, owner in zip(units, owners, strict=True) for n in names}
    return {name: by_name[name] for name in targets}


def _joined(units: list[list[str]], shared_input: Mapping[str, str]) -> list[list[str]]:
    """The units, those joined whose modules share a moment."""
    of = {name: index for index, names in enumerate(units) for name in names}
    for follower, leader in shared_input.items():
        if follower not in of or leader not in of:
            continue  # a module of the statistics that is no target
        into, away = sorted((of[leader], of[follower]))
        if into != away:
            units[into] += units[away]
            of |= dict.fromkeys(units[away], into)
            units[away] = []
    return [names for names in units if names]


def holders_by_cost(
    group: Group, targets: Mapping[str, Target], shared_input: Mapping[str, str], contrast: bool
) -> dict[str, tuple[int, ...]]:
    """Module → the ranks that take its energies, of one block whose modules are spread over all.

    The same on every rank; the first one chooses. Balanced by the products that energies take: with
    p = min(m, n) a Gram matrix, p² max(m, n), and three forms or products with it, p² n. A module
    of more than an even share of the block goes to several ranks, each of which takes the energies
    of some columns of W (:func:`columns_of`) and the Gram matrix anew. ``contrast``: by a
    decomposition for each input moment, whose modules have one owner.
    """
    units = [[name] for name in targets]
    if contrast:
        units = _joined(units, shared_input)
    costs = []
    for names in units:
        m, n = targets[names[0]].shape
        p = min(m, n)
        if contrast:
            costs.append((n if names[1:] else p) ** 3)
        else:
            costs.append(p * p * (max(m, n) + 3 * _FORM * n))
    share = sum(costs) / group.size
    parts = []  # which unit, and the cost
    for index, (names, cost) in enumerate(zip(units, costs, strict=True)):
        m, n = targets[names[0]].shape
        divided = not contrast and cost > _DIVIDED * share
        count = len(_slices(n, min(-int(-cost // share), group.size))) if divided else 1
        gram = min(m, n) ** 2 * max(m, n)
        parts += count * [(index, gram + (cost - gram) // count if divided else cost)]
    ranks = balanced([cost for _, cost in parts], [0] * group.size)
    of_unit: list[list[int]] = [[] for _ in units]
    for (index, _), rank in zip(parts, ranks, strict=True):
        if rank not in of_unit[index]:
            of_unit[index].append(rank)
    return {name: tuple(of_unit[i]) for i, names in enumerate(units) for name in names}


def columns_of(holders: Sequence[int], n: int) -> dict[int, slice]:
    """Rank → the columns of W, of n, whose energies it takes."""
    return dict(zip(holders, _slices(n, len(holders)), strict=False))


def _slices(n: int, count: int) -> list[slice]:
    """``count`` parts of n columns, or fewer: as equal as tiles are, where there are so many."""
    step = -(-n // count)
    if n >= _TILE * count:
        step = -(-step // _TILE) * _TILE
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


class Together:
    """Makes the moments that each process took of its samples those of all.

    Attributes:
        group: the processes.
        in_step: has them run a sharded model equally often.
        owners: module → the rank that chooses for it, as far as its sums were taken.
        holders: module → the ranks that have its sums, the owner first. A moment that several
            modules share is with the holders of all of them.
    """

    def __init__(
        self,
        group: Group,
        targets: Mapping[str, Target],
        holders: Holders | None = None,
        sharded: bool = False,
    ) -> None:
        """``holders``: who has the sums of modules of ``targets``, given whose input each shares.

        By default one rank each, by :func:`owners_by_block`, the load of earlier passes counted.
        ``sharded``: the processes run one model together, whose weights are divided.
        """
        self.group = group
        self.in_step = InStep(group if sharded else None)
        self.holders: dict[str, tuple[int, ...]] = {}
        self._targets = targets
        self._holders = holders or partial(_alone, group, [0] * group.size)

    @property
    def owners(self) -> dict[str, int]:
        return {name: ranks[0] for name, ranks in self.holders.items()}

    def moments(
        self,
        names: Iterable[str],
        found: Mapping[str, Moments],
        shared_input: Mapping[str, str],
        loss_terms: int,
    ) -> tuple[dict[str, Moments], dict[str, str]]:
        """The moments of these modules over all processes, and whose input each shares. Collective.

        A process may have none of a module (an expert that no token of its samples went to): it
        adds nothing. One that no process reached is empty.

        Args:
            names: of the modules, the same on every rank.
            found: what this process has of them; on the owner of a block it is added to in place.
            shared_input: module → the module whose input moment it shares here.
            loss_terms: of all processes.
        """
        found = {name: found[name] for name in names if name in found}
        forms = {name: _Form.of(its, shared_input.get(name)) for name, its in found.items()}
        tokens = _tokens(found)
        said = self.group.exchanged((forms, tokens))
        known = _agreed([forms for forms, _ in said])
        mine = {name: self._targets[name] for name in names}
        shared = {name: form.leader for name, form in known.items() if form.leader is not None}
        self.holders |= self._holders(mine, shared_input=shared)
        for name in mine:
            if name not in known:
                known[name] = _Form.of(empty_moments(mine[name], device="meta"), None)
        counts = {
            name: tuple(sum(each.get(name, (0, 0))[side] for _, each in said) for side in (0, 1))
            for name in mine
        }
        return self._reduced(mine, known, found, counts, loss_terms), shared

    def _reduced(
        self,
        targets: Mapping[str, Target],
        known: Mapping[str, _Form],
        found: Mapping[str, Moments],
        counts: Mapping[str, tuple[int, ...]],
        loss_terms: int,
    ) -> dict[str, Moments]:
        parts = []
        for name, target in targets.items():
            its, form = found.get(name), known[name]
            for side, (space, size) in enumerate((form.input, form.output)):
                if side or form.leader is None:
                    square = self._square(target, size, its, side)
                    parts.append(_Part(name, side, space, square))
        shared = {name: form.leader for name, form in known.items() if form.leader is not None}
        sides = self._sums(parts, counts, shared)
        result = {}
        for name, target in targets.items():
            leader = known[name].leader
            input, output = sides[name if leader is None else leader, 0], sides[name, 1]
            terms = torch.tensor(loss_terms, dtype=torch.int64, device=output.count.device)
            result[name] = Moments(input, output, target.shape, terms)
        return result

    def inputs(
        self,
        found: Mapping[str, SecondMoment],
        shared_input: Mapping[str, str],
    ) -> dict[str, SecondMoment]:
        """Input moments over all processes, which all have of the same modules. Collective.

        ``found`` is added to in place; shared moments stay shared.
        """
        found = {name: found[name] for name in self._targets if name in found}
        counts = values([moment.count for moment in found.values()])
        said = self.group.exchanged(dict(zip(found, counts, strict=True)))
        totals = {name: (sum(each[name] for each in said),) for name in found}
        parts = []
        for name, moment in found.items():
            if shared_input.get(name) not in found:
                square = (len(moment.sum), moment.sum.dtype, moment.sum.device, moment.sum)
                parts.append(_Part(name, 0, moment.space, square))
        sides = self._sums(parts, totals, shared_input)
        leaders = {name: shared_input.get(name, name) for name in found}
        return {name: sides[of if of in found else name, 0] for name, of in leaders.items()}

    def _square(self, target: Target, size: int, its: Moments | None, side: int) -> Square:
        dtype, device = target.sums
        sums = None if its is None else (its.output if side else its.input).sum
        return size, dtype, device, sums

    def _sums(
        self,
        parts: Sequence[_Part],
        counts: Mapping[str, tuple[int, ...]],
        shared_input: Mapping[str, str],
    ) -> dict[tuple[str, int], SecondMoment]:
        """The parts over all processes, for the owners of a block at a time."""
        block_of = {
            name: block
            for block, its in blocks({p.name: self._targets[p.name] for p in parts}).items()
            for name in its
        }
        work: dict[tuple[str, int], list[tuple[_Part, Square]]] = {}
        for part in parts:
            users = [part.name]
            if not part.side:
                users += [name for name, leader in shared_input.items() if leader == part.name]
            ranks = {rank for name in users for rank in self.holders.get(name, ())}
            for rank in sorted(ranks):
                size, dtype, device, tensor = part.square
                # What a holder adds to must not be what the others' sums are packed from.
                if tensor is not None and rank == self.group.rank and len(ranks) > 1:
                    tensor = tensor.clone()
                square = size, dtype, device, tensor
                work.setdefault((block_of[part.name], rank), []).append((part, square))
        sums = reduced(
            self.group,
            [(rank, [square for _, square in its]) for (_, rank), its in work.items()],
        )
        sides: dict[tuple[str, int], SecondMoment] = {}
        for owned, found in zip(work.values(), sums, strict=True):
            for (part, _), sum_ in zip(owned, found, strict=True):
                key = part.name, part.side
                if key in sides and sum_.is_meta:
                    continue  # it is another holder's as well, perhaps this process's
                # A count is there on every rank, beside a sum that is not.
                place = torch.device("cpu") if sum_.is_meta else sum_.device
                count = torch.tensor(counts[part.name][part.side], dtype=torch.int64, device=place)
                sides[key] = SecondMoment(part.space, sum_, count)
        return sides


def _alone(
    group: Group,
    loads: list[int],
    targets: Mapping[str, Target],
    *,
    shared_input: Mapping[str, str],
) -> dict[str, tuple[int, ...]]:
    owners = owners_by_block(group, targets, shared_input, loads)
    return {name: (owner,) for name, owner in owners.items()}


@dataclasses.dataclass(frozen=True)
class _Form:
    """What has to be the same of a module's moments wherever they were taken."""

    input: tuple[Space, int]  # and size
    output: tuple[Space, int]
    leader: str | None

    @classmethod
    def of(cls, moments: Moments, leader: str | None) -> _Form:
        input, output = moments.input, moments.output
        return cls((input.space, len(input.sum)), (output.space, len(output.sum)), leader)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One moment on its way: of which module, 0 for its input and 1 for its output."""

    name: str
    side: int
    space: Space
    square: Square


def _agreed(said: Sequence[Mapping[str, _Form]]) -> dict[str, _Form]:
    """The form of every module that any process has; ValueError where two differ."""
    known: dict[str, tuple[int, _Form]] = {}
    for rank, forms in enumerate(said):
        for name, form in forms.items():
            first, other = known.setdefault(name, (rank, form))
            if other != form:
                raise ValueError(
                    f"{name}: its moments are {form} on rank {rank} and {other} on rank {first}; "
                    "expected the same data flow on every rank, or FiletConfig(share_inputs=False)"
                )
    return {name: form for name, (_, form) in known.items()}


def _tokens(found: Mapping[str, Moments]) -> dict[str, tuple[int, int]]:
    """Module → the tokens that its input's and its output's moment count."""
    sides = [side.count for its in found.values() for side in (its.input, its.output)]
    counts = values(sides)
    return dict(zip(found, zip(counts[::2], counts[1::2], strict=True), strict=True))
