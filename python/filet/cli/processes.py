"""The processes that torchrun or another launcher started, for the time of a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from filet.cli.output import Said, expected_errors, one_line, say_error

__all__ = ["agreed", "check_same", "launched", "rank_and_size"]


@contextlib.contextmanager
def launched(args: argparse.Namespace) -> Iterator[None]:
    """Inside, a command of one process among ``WORLD_SIZE``; nothing is done where that is not set.

    The first process alone says something, errors apart: of these each is said once.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch.distributed as dist

    from filet.distributed.group import current

    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            _start(args)
            stack.callback(dist.destroy_process_group)
        group = current()
        assert group is not None
        if group.rank:
            args.no_progress = True
            stack.enter_context(_silence())
        try:
            with group:
                yield
        except Exception as error:
            if not args.debug:
                _say_once(group, error)
            raise


def _say_once(group: Any, error: Exception) -> None:
    """Print what processes had as errors, the same one once, by the lowest rank that had it.

    Before any of them ends: launchers end the others with the first, whatever they had to say.
    Raises :class:`Said` then. Where the others cannot be asked, or one had what no user can cause,
    nothing is printed here.
    """
    printed = isinstance(error, expected_errors()) and not isinstance(error, BrokenPipeError)
    said = group.accounts(one_line(error) if printed else "")
    if "" in said or not any(said):
        return
    text = said[group.rank]
    if text is not None and said.index(text) == group.rank:
        everywhere = said.count(text) == group.size
        say_error(text if everywhere else f"rank {group.rank}: {text}")
    with contextlib.suppress(ConnectionError):
        group.settle()  # all of it is printed
    raise Said from error


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) for one alone."""
    from filet.distributed.group import current

    group = current()
    return (0, 1) if group is None else (group.rank, group.size)


def agreed(passes: int, batch_size: int) -> tuple[int, int]:
    """What all processes can do: the most passes, the smallest batches. Collective."""
    from filet.distributed.group import current

    group = current()
    if group is None:
        return passes, batch_size
    said = group.exchanged((passes, batch_size))
    return max(each for each, _ in said), min(each for _, each in said)


def check_same(what: str, value: object) -> None:
    """ValueError in all processes where one has another value. Collective."""
    from filet.distributed.group import current

    group = current()
    if group is not None:
        group.check_same({what: value})


def _start(args: argparse.Namespace) -> None:
    """Join the group, each process with a GPU of its own where there are any."""
    import torch
    import torch.distributed as dist

    from filet.cli.model import device_of

    if not device_of(args).startswith("cuda"):
        dist.init_process_group("gloo")
        return
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {there}; expected at most as "
            "many processes (--nproc-per-node), or --device cpu"
        )
    torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    show = warnings.showwarning

    def nothing(*_: Any, **__: Any) -> None: ...

    warnings.showwarning = nothing
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        warnings.showwarning = show
