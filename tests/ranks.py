"""Functions run by several processes of torch.distributed at once: by gloo, on GPUs by NCCL."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import every_cpu

# Their imports take seconds: a server makes them once, and every process is a fork of it. Some look
# at the GPUs, which a fork cannot use then: processes with GPUs import for themselves.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["filet.initialize", "filet.trainer", "filet.cli.main"])

_LIMIT = 300  # most take 10; a machine with other work has been seen to need 100


@dataclass
class Ended:
    """What a rank returned, or raised, or did as it crashed; None for all where it was killed."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run(
    size: int,
    function: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    join: bool = True,
    gpus: bool = False,
    launched: bool = False,
) -> list[Ended]:
    """``function(rank, folder, *arguments)`` on every rank, what it returns by a file.

    ``join=False`` leaves it to the function to find the others. ``gpus``: each has a GPU of its
    own. ``launched``: as a launcher starts them and no fork is, each with an order of its own in
    the sets of strings. A rank that hangs is ended after :data:`_LIMIT` seconds, and fails the
    test.
    """
    (folder / "rendezvous").unlink(missing_ok=True)
    context: Any = multiprocessing.get_context("spawn") if gpus or launched else _CONTEXT
    processes = [
        context.Process(target=_main, args=(rank, size, function, folder, arguments, join, gpus))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(_LIMIT)
            assert process.exitcode is not None, "a rank hangs"
    finally:
        for process in processes:
            process.kill()
    ended = []
    for rank, process in enumerate(processes):
        path, crash = folder / f"rank{rank}.pt", folder / f"rank{rank}.crash"
        found = torch.load(path, weights_only=False) if path.exists() else Ended()
        if crash.exists():  # its stacks, before a list of all extension modules
            found.error = found.error or crash.read_text().partition("\nExtension")[0] or None
        found.exitcode = process.exitcode
        ended.append(found)
        path.unlink(missing_ok=True)
        crash.unlink(missing_ok=True)
    return ended


def values(ended: list[Ended]) -> list[Any]:
    """What all ranks returned; none may have failed."""
    failed = [
        f"rank {rank}, which ended with {each.exitcode}: {each.error}"
        for rank, each in enumerate(ended)
        if each.error is not None or each.exitcode != 0
    ]
    assert not failed, "\n".join(failed)
    return [each.value for each in ended]


def errors(ended: list[Ended]) -> list[str]:
    """What each rank raised, by its type and message; all of them have to."""
    for rank, each in enumerate(ended):
        assert each.error is not None, f"rank {rank} raised nothing"
    return [str(each.error).splitlines()[0] for each in ended]


def _main(
    rank: int,
    size: int,
    function: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
    join: bool,
    gpus: bool,
) -> None:
    # A signal that ends the process leaves its threads' stacks for whoever reads the failure.
    crash = (folder / f"rank{rank}.crash").open("w")
    faulthandler.enable(crash)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore", FutureWarning)
    every_cpu.alike()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate asks for them
    where = f"file://{folder}/rendezvous"
    if gpus:
        torch.cuda.set_device(rank)
    if join:
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=size)
    try:
        ended = Ended(function(rank, folder, *arguments))
    except BaseException as error:
        message = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        ended = Ended(error=message)
    torch.save(ended, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
