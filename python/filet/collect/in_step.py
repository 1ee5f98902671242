"""The processes of a sharded model, which gather its weights for every forward and backward.

All of them have to run it equally often, whatever samples each has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from filet.distributed.group import Group
from filet.model.batch import on_host
from filet.model.inputs import Prepared

__all__ = ["InStep"]

T = TypeVar("T")


class InStep:
    """Keeps the processes in step; of one process, or of models that are whole, does nothing."""

    def __init__(self, group: Group | None = None) -> None:
        """``group``: the processes that run the model together; None where this one runs alone."""
        self._group = group

    @property
    def several(self) -> bool:
        """Whether there are others to keep in step with."""
        return self._group is not None

    def most(self, value: Any) -> Any:
        """The largest of what the processes give. Collective."""
        return value if self._group is None else max(self._group.exchanged(value))

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """A call that runs the model: an exception in it is not told to the others.

        They may be waiting for this process's part of a weight, and would not hear it.
        """
        if self._group is None:
            return function(*arguments)
        with self._group.untold():
            return function(*arguments)

    def batches(self, batches: Iterable[Prepared]) -> Iterator[tuple[Prepared, bool]]:
        """The batches, and True; after the last of them, as long as another process has one, the
        last one again, and False: it is to be run and not counted. Collective.

        Who has none at all gets one of another process's.
        """
        if self._group is None:
            yield from ((batch, True) for batch in batches)
            return
        source = iter(batches)
        last: Prepared | None = None
        while True:
            batch = next(source, None)
            said = self._group.exchanged((batch is not None, batch is None and last is None))
            having = [rank for rank, (has, _) in enumerate(said) if has]
            if not having:
                return
            if any(lacks for _, lacks in said):
                giver = having[0]
                given = batch if self._group.rank == giver else None
                given = self._group.exchanged(None if given is None else _on_host(given))[giver]
                last = last or given
            last = last if batch is None else batch
            assert last is not None
            yield last, batch is not None


def _on_host(prepared: Prepared) -> Prepared:
    return dataclasses.replace(
        prepared, batch=on_host(prepared.batch), masks=on_host(prepared.masks)
    )
