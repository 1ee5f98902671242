"""A causal language model in parts, found without its code: before the blocks, blocks, after, head.

The model's own forward is run with the blocks' forward replaced: what they are called with, and
what follows them, is then known for any model that chains its blocks by one tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from filet.model.batch import of_text
from filet.model.beside import text_path
from filet.model.targets import Target
from filet.system.names import split
from filet.system.text import some

__all__ = ["Calls", "Parts", "described"]


class _Captured(Exception):
    """Leaves a model's forward with what it was run for."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Leaf(int):
    """In place of a tensor: its position in a list of them."""


@dataclass(eq=False)
class Calls:
    """What the blocks are called with for one batch, besides the hidden states."""

    leaves: list[Tensor]  # on the host, each once
    arguments: list[tuple[Any, Any]]  # of each block: positional and by name, with _Leaf's
    wanted: list[list[int]]  # of each block: which leaves

    def of(self, block: int) -> list[Tensor]:
        return [self.leaves[index] for index in self.wanted[block]]

    def filled(self, block: int, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        known = dict(zip(self.wanted[block], tensors, strict=True))
        args, kwargs = self.arguments[block]
        return _filled(args, known), _filled(kwargs, known)


def _filled(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, _Leaf):
        return known[value]
    if isinstance(value, dict):
        return {key: _filled(each, known) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(each, known) for each in value)
    return value


_Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # hidden states, the other arguments


class Parts:
    """The parts of ``model``, whose blocks are the ModuleList with the most target weights.

    Raises ValueError for a model that is not a chain of blocks, when that shows.
    """

    def __init__(
        self, model: Any, targets: Mapping[str, Target], others: Iterable[str] = ()
    ) -> None:
        """``others``: modules with an adapter that are no targets."""
        self.model = model
        self.path, self.blocks = _find_blocks(model, targets, others)
        parent = self.path.rpartition(".")[0]
        self.parent: nn.Module = model.get_submodule(parent) if parent else model
        if self.parent is model:
            raise ValueError(
                f"the blocks of {type(model).__name__} lie in the model itself; expected them in a "
                "model of its own below the head, as transformers has it"
            )
        self._tuples = False  # blocks return a tuple
        self._sees = text_path(model) is not None

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        try:
            for index, block in enumerate(self.blocks):
                block.forward = forward(index)
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)

    def capture(self, inputs: dict[str, Any]) -> tuple[Tensor, Calls]:
        """The first block's input for a batch, and what each block is called with."""
        try:
            seen, handed = self._chain(inputs)
        except _NotChained as error:
            if self._tuples:
                raise
            self._tuples = True
            try:
                seen, handed = self._chain(inputs)
            except IndexError as taken:
                raise ValueError(
                    f"{type(self.model).__name__} takes more than the hidden states from a block "
                    f"of {self.path} ({taken}); the blockwise engine takes chains of blocks only"
                ) from taken
            except (AttributeError, TypeError, ValueError):
                raise error from None  # no tuples either
        hidden = seen[0][0].detach()
        own = {id(hidden), *map(id, handed), *(id(each[0]) for each in seen)}
        leaves: dict[int, tuple[_Leaf, Tensor]] = {}
        arguments, wanted = [], []
        for index, (_, args, kwargs) in enumerate(seen):
            used: set[int] = set()
            arguments.append(
                (
                    self._packed(args, index, own, leaves, used),
                    self._packed(kwargs, index, own, leaves, used),
                )
            )
            wanted.append(sorted(used))
        hosts = [tensor.detach().to("cpu", copy=True) for _, tensor in leaves.values()]
        if hidden.is_cuda:
            hosts = [host.pin_memory() for host in hosts]
        return hidden, Calls(hosts, arguments, wanted)

    def _chain(self, inputs: dict[str, Any]) -> tuple[list[_Call], list[Tensor]]:
        """How the blocks are called, and what each handed to the next."""
        seen: list[_Call] = []
        handed: list[Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args or not isinstance(args[0], Tensor):
                    kind = type(args[0]).__name__ if args else "no positional argument"
                    raise ValueError(
                        f"{self.path}.{index} is called with {kind} first; expected a tensor, the "
                        "hidden states"
                    )
                if index != len(seen) or (handed and args[0] is not handed[-1]):
                    raise _NotChained(
                        f"{type(self.model).__name__} does not hand the output of one block of "
                        f"{self.path} to the next as it is (at block {index}); the blockwise "
                        "engine takes chains of blocks only, engine='memory' also others"
                    )
                seen.append((args[0], args[1:], kwargs))
                if index == len(self.blocks) - 1:
                    raise _Captured(None)
                handed.append(args[0].view_as(args[0]))
                return (handed[-1],) if self._tuples else handed[-1]

            return forward

        with self._replaced(stub), contextlib.suppress(_Captured), torch.no_grad():
            self.model(**inputs, use_cache=False)
        if len(seen) != len(self.blocks):
            raise ValueError(
                f"{len(seen)} of the {len(self.blocks)} blocks of {self.path} were called; "
                "expected all, in order"
            )
        return seen, handed

    def _packed(
        self,
        value: Any,
        block: int,
        own: set[int],
        leaves: dict[int, tuple[_Leaf, Tensor]],
        used: set[int],
    ) -> Any:
        if isinstance(value, Tensor):
            if id(value) in own:
                raise ValueError(
                    f"{self.path}.{block} is also called with the hidden states of another block; "
                    "the blockwise engine takes chains of blocks only"
                )
            leaf, _ = leaves.setdefault(id(value), (_Leaf(len(leaves)), value))
            used.add(leaf)
            return leaf
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            return value
        if isinstance(value, Mapping):
            return {k: self._packed(v, block, own, leaves, used) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._packed(v, block, own, leaves, used) for v in value)
        raise ValueError(
            f"{self.path}.{block} is called with a {type(value).__name__}; the blockwise engine "
            "takes blocks that keep no state, called with tensors and plain values"
        )

    def run_block(self, block: int, hidden: Tensor, calls: Calls, tensors: Any) -> Tensor:
        args, kwargs = calls.filled(block, tensors)
        output = self.blocks[block](hidden, *args, **kwargs)
        # What else a tuple holds nobody asks for: capture() handed on the first alone.
        first = output[0] if isinstance(output, tuple) else output
        chained = len(self.blocks) == 1 or isinstance(output, tuple) == self._tuples
        if not isinstance(first, Tensor) or not chained:
            raise ValueError(
                f"{self.path}.{block} returned {described(output)}; expected the hidden states, "
                "as the model's forward takes them from it"
            )
        if first.shape != hidden.shape or first.dtype != hidden.dtype:
            raise ValueError(
                f"{self.path}.{block} made {described(first)} of {described(hidden)}; expected "
                "blocks that keep shape and dtype"
            )
        if len(self.blocks) == 1:
            self._tuples = isinstance(output, tuple)
        return first

    def epilogue(self, inputs: dict[str, Any], hidden: Tensor) -> Any:
        """What the head gets for the last block's output: an output with ``last_hidden_state``."""

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                value = hidden if index == len(self.blocks) - 1 else args[0]
                return (value,) if self._tuples else value

            return forward

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            raise _Captured(output)

        handle = self.parent.register_forward_hook(hook)
        if self._sees:  # the images are in the blocks' inputs, and go through no second time
            inputs = of_text(inputs)
        try:
            with self._replaced(stub):
                self.model(**inputs, use_cache=False)
        except _Captured as captured:
            output = captured.value
        finally:
            handle.remove()
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            raise ValueError(
                f"{type(self.parent).__name__} returned {described(output)}; expected an output "
                "with last_hidden_state"
            )
        return output

    def logits(self, output: Any, rows: Tensor) -> Tensor:
        """Logits (T, V) of rows (T, D) of ``output.last_hidden_state``, by the model's own head."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return type(output)(last_hidden_state=rows.unsqueeze(0))

        self.parent.forward = forward
        try:
            ids = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=rows.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            del self.parent.forward
        if logits.shape[:2] != (1, rows.shape[0]):
            raise ValueError(
                f"the head made logits {tuple(logits.shape)} of {rows.shape[0]} rows; expected one "
                "row of logits each"
            )
        return logits.squeeze(0)


class _NotChained(ValueError):
    """A model whose blocks are no chain, or not of this kind of output."""


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(described(each) for each in value)})"
    return f"a {type(value).__name__}"


def _find_blocks(
    model: nn.Module, targets: Mapping[str, Target], others: Iterable[str]
) -> tuple[str, list[nn.Module]]:
    """The ModuleList that holds the most target weights, and the outermost one of those."""
    best: tuple[int, int, str] | None = None
    text = text_path(model)
    for path, module in model.named_modules():
        if text is not None and not path.startswith(f"{text}."):
            continue  # of images, say
        if isinstance(module, nn.ModuleList) and len(module):
            held = sum(
                math.prod(target.shape)
                for name, target in targets.items()
                if split(name, path).index is not None
            )
            if held and (best is None or (held, -len(path)) > best[:2]):
                best = (held, -len(path), path)
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList with a target module in it; the blockwise "
            "engine takes models whose blocks are one"
        )
    path = best[2]
    outside = [name for name in [*targets, *others] if split(name, path).index is None]
    if outside:
        raise ValueError(
            f"{some(outside)}: outside the blocks {path}; the blockwise engine takes layers inside "
            "them only: expected target_modules without (or engine='memory')"
        )
    blocks: Any = model.get_submodule(path)
    return path, list(blocks)
