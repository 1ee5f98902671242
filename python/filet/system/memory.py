"""How much memory is free, and running out of it said so that one knows what to change."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from filet.system.text import readable

__all__ = [
    "ADVICE",
    "OutOfMemoryError",
    "Phase",
    "available",
    "available_on_host",
    "capacity",
    "named_shortage",
    "peak_memory",
]

ADVICE = (
    "smaller batches (--batch-size)",
    "shorter samples (--max-length)",
    "gradient checkpointing (model.gradient_checkpointing_enable(), --gradient-checkpointing)",
    "fewer target modules (--target-modules)",
    "moments on the host, in several passes (FiletConfig(passes=N), --passes N)",
    "one block at a time (--engine blockwise)",
)

Phase = Literal["loading", "checks", "pass", "selection", "blockwise"]

_ADVICE: dict[Phase, tuple[str, ...]] = {
    "loading": ("weights in 16 bits (--dtype bfloat16)", *ADVICE[5:]),
    "checks": ADVICE[3:],
    "pass": ADVICE,
    "selection": ADVICE[3:],
    "blockwise": (ADVICE[0], ADVICE[1], ADVICE[3], "less host memory (--host-memory)"),
}


class OutOfMemoryError(torch.OutOfMemoryError, MemoryError):
    """A device (or the host) had no memory left. The model is what it was before the call.

    Both a ``torch.OutOfMemoryError`` and a ``MemoryError``; its cause is the error that torch or
    Python raised.

    Attributes:
        phase: "pass", where smaller batches may help; "loading" of a model from its folder and
            "checks" of the weights, before it; "selection" of directions, after it; "blockwise",
            all of that engine.
        requested: what was asked for, as torch wrote it ("2.00 GiB"); None where it does not say.
    """

    def __init__(self, message: str, phase: Phase, requested: str | None) -> None:
        super().__init__(message)
        self.phase = phase
        self.requested = requested


@contextlib.contextmanager
def named_shortage(phase: Phase, place: Callable[[], str]) -> Iterator[None]:
    """Turns what torch and Python raise without memory into :class:`OutOfMemoryError`.

    ``place()`` says what was under way, "the forward of batch 3". The innermost one names it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not _is_shortage(error):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        requested = asked[1] if asked else None
        raise OutOfMemoryError(
            f"out of memory in {place()}: {requested or 'more than there is'} asked for"
            f"{_on(str(error))}; expected one or more of: {', '.join(_ADVICE[phase])}",
            phase,
            requested,
        ) from error


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Plain RuntimeErrors: of torch's allocator on a CPU, of the driver, of cuBLAS.
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(word in str(error) for word in words)


def _on(message: str) -> str:
    gpu = re.search(r"GPU (\d+)", message)
    if gpu is None:
        return " of the host" if "CUDA" not in message else ""
    device = torch.device("cuda", int(gpu[1]))
    if not torch.cuda.is_available():
        return f" on {device}"
    free, most = available(device), capacity(device)
    return f" on {device}, where {readable(free)} of {readable(most)} are free"


def available(device: torch.device) -> int:
    """Bytes free on a CUDA device, with what torch's allocator has reserved and does not use.

    No more than the process may still have.
    """
    allocated = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return min(free, capacity(device)) - allocated


def capacity(device: torch.device) -> int:
    """Bytes of a CUDA device that are this process's at most.

    That is all of it, or its share by ``torch.cuda.set_per_process_memory_fraction``.
    """
    total = torch.cuda.mem_get_info(device)[1]
    return int(torch.cuda.get_per_process_memory_fraction(device) * total)


def available_on_host() -> int:
    """Bytes of host memory that can be had without swapping."""
    with contextlib.suppress(FileNotFoundError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(devices: set[torch.device]) -> int:
    """Bytes: the peak allocated on the CUDA devices, or the process's peak resident set."""
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
