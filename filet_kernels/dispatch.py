"""Which implementation of an operation runs: one registry for all operations.

An :class:`Operation` lists its backends in the order of preference: kernels first, and plain torch,
which takes whatever the operation takes, last. To add a backend, add it to its operation's list.
What backends ask about a device, and what they do on one, is here too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "Operation",
    "by_triton",
    "capability",
    "define",
    "has_tma_rows",
    "mutated",
    "on",
    "runs_triton",
    "why_no_triton",
]

_library = torch.library.Library("filet_kernels", "FRAGMENT")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    ``unsupported`` says why it cannot run on these operands, or None where it can.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda *operands: None


class Operation:
    """The backends of one operation, in the order of preference; the last runs everywhere."""

    def __init__(self, *backends: Backend) -> None:
        self.backends = backends
        self.names = tuple(backend.name for backend in backends)

    def check(self, name: str | None) -> None:
        """Raise ValueError unless there is such a backend, or None is asked for."""
        if name is not None and name not in self.names:
            raise ValueError(f"backend={name!r}; expected None or one of {', '.join(self.names)}")

    def choose(self, name: str | None, *operands: Any) -> Backend:
        """The backend of that name, or for None the first that supports the operands.

        The first operand says on which device they are. Elsewhere than on a GPU None takes the
        last: Triton's interpreter is for tests, and only an explicit choice takes it.

        Raises:
            ValueError: an unknown name, or one that does not support the operands.
        """
        if name is None:
            if operands[0].is_cuda:
                for backend in self.backends:
                    if backend.unsupported(*operands) is None:
                        return backend
            return self.backends[-1]
        self.check(name)
        backend = self.backends[self.names.index(name)]
        reason = backend.unsupported(*operands)
        if reason is not None:
            raise ValueError(f"backend={name!r} does not support these operands: {reason}")
        return backend


def by_triton(
    module: str,
    function: str,
    unsupported: Callable[..., str | None] = lambda x, *operands: why_no_triton("x", x.device),
) -> Backend:
    """The backend of a function that launches a Triton kernel on the device of its first operand.

    Its module is imported at the first call, since Triton is optional.
    """
    found = functools.cache(lambda: getattr(importlib.import_module(module), function))

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with on(x.device):
            return found()(x, *args, **kwargs)

    return Backend("triton", run, unsupported)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_no_triton(operand: str, device: torch.device) -> str | None:
    """Why Triton cannot run on the device of that operand, or None where it can."""
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cuda":
        return None if capability(device) >= (8, 0) else "it needs compute capability 8.0"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"{operand} is on {device}; expected a CUDA device, or TRITON_INTERPRET=1"
    return None


def runs_triton(device: torch.device) -> bool:
    """Whether operations without a choice of backends run by Triton there."""
    return device.type == "cuda" and why_no_triton("it", device) is None


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a CUDA device is the current one: kernels are launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_tma_rows(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: contiguous, 16-byte aligned, separate rows."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make it ``torch.ops.filet_kernels.<name>``, which torch.compile traces by ``fake``.

    torch.library.custom_op does the same, at 24 µs a call instead of 3 (torch 2.13, one CPU core).
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"filet_kernels::{name}", fake)


def mutated(x: Tensor) -> None:
    """Let autograd know that x was changed in place, as custom_op would."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
