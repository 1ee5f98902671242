"""Processes that train populations, one a GPU, and who gets which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
from torch.multiprocessing import get_context

from effect.records import Record, Run
from effect.sweeps import family
from effect.train import FROZEN
from effect.variants import VARIANTS

__all__ = ["Trains", "chunks", "devices", "subtracts", "trained"]


class Trains(Protocol):
    """What a process makes for its device, and asks for populations."""

    def train(self, runs: Sequence[Run]) -> list[Record]: ...


def devices() -> list[torch.device]:
    """Every GPU, or the CPU."""
    count = torch.cuda.device_count()
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]


def subtracts(method: str) -> bool:
    """Whether its start is subtracted from the base: those have populations of their own."""
    method = method.removesuffix(FROZEN)
    zero = method.endswith(".zero") or method in ("lora", "gaussian", "orthogonal", "eva")
    form = method.startswith(("contrast", "eva-ref", "filet-keep"))
    return not zero and not (form and not method.endswith((".untouched", ".both")))


def chunks(runs: Sequence[Run], members: int) -> list[list[Run]]:
    """Runs by populations: each of one task, one kind of adapter and start, and of few seeds.

    Each is of one number of samples, so that no process has to look at all of them. The first task
    comes first. Members of one seed see the same batches, which is the least padding.
    """

    def kind(run: Run) -> tuple[Any, ...]:
        method = run.member.method
        return run.task, run.rank, run.samples, method if method in VARIANTS else subtracts(method)

    found = []
    for each in dict.fromkeys(map(kind, runs)):
        alike = sorted((run for run in runs if kind(run) == each), key=lambda run: run.member.seed)
        found += [alike[i : i + members] for i in range(0, len(alike), members)]
    order = list(dict.fromkeys(run.task for run in runs))
    return sorted(found, key=lambda chunk: order.index(chunk[0].task))


@dataclass(eq=False)
class _Worker:
    connection: Connection
    known: set[tuple[str, str]] = field(default_factory=set)  # what it has computed starts of
    runs: list[Run] = field(default_factory=list)  # what it trains now

    def strangers(self, chunk: Sequence[Run]) -> int:
        """How many methods of a chunk it has no starts of."""
        return len(_methods(chunk) - self.known)


def _methods(runs: Iterable[Run]) -> set[tuple[str, str]]:
    return {(run.task, family(run.member.method)) for run in runs}


def trained(
    make: Callable[[torch.device], Trains],
    lacking: Callable[[], Iterable[Run]],
    members: int,
    more: Callable[[], bool] = lambda: True,
) -> Iterator[list[Record]]:
    """Records as populations are done, until ``lacking()`` has nothing that is not being trained.

    Args:
        make: called in a process for each device; must be picklable.
        lacking: what is still to be trained, by all records that were yielded.
        more: whether another population may be begun.
    """
    spawn = get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for device in devices():
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(make, device, there), daemon=True)
            process.start()
            there.close()
            stack.callback(process.join)
            stack.callback(here.close)  # which ends it, before it is waited for
            workers.append(_Worker(here))
        while True:
            for worker in workers:
                if not worker.runs and more():
                    _give(worker, workers, lacking(), members)
            busy = {worker.connection: worker for worker in workers if worker.runs}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                try:
                    done = worker.connection.recv()
                except EOFError as error:  # its own traceback is on stderr
                    raise RuntimeError(f"a process ended while it trained {worker.runs}") from error
                worker.runs = []
                yield done


def _give(worker: _Worker, workers: list[_Worker], wanted: Iterable[Run], members: int) -> None:
    """The cheapest population of those that nobody trains, of the first task that lacks any."""
    flying = {run for each in workers for run in each.runs}
    found = chunks([run for run in wanted if run not in flying], members)
    if not found:
        return
    found = [chunk for chunk in found if chunk[0].task == found[0][0].task]

    def cost(chunk: list[Run]) -> tuple[bool, int, int]:
        # Last what has more parameters than A and B, and what is not full: to that more may come.
        return chunk[0].member.method in VARIANTS, worker.strangers(chunk), -len(chunk)

    worker.runs = min(found, key=cost)
    worker.known |= _methods(worker.runs)
    worker.connection.send(worker.runs)


def _serve(make: Callable[[torch.device], Trains], device: torch.device, end: Connection) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = make(device)
    while True:
        try:
            runs = end.recv()
        except EOFError:
            return
        end.send(bench.train(runs))
