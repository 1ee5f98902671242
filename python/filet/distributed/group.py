"""The processes of a run: what they tell each other, and how all of them end where one fails."""

from __future__ import annotations

import contextlib
import io
import pickle
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from filet.system.memory import OutOfMemoryError

__all__ = ["TIMEOUT", "Group", "current", "joined"]

T = TypeVar("T")

_NUMPY = (torch.float64, torch.float32, torch.float16, torch.int64)  # what numpy has as well

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, torch's own default. A dead one is noticed at once."""

# Exceptions that the other processes raise as what they are, the narrowest first.
_KINDS: tuple[type[Exception], ...] = (
    FloatingPointError,
    ImportError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class _Failure:
    """An exception of one process, as the others hear of it."""

    kind: type[Exception]
    message: str
    shortage: tuple[Any, Any] | None  # phase and bytes of an OutOfMemoryError

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, OutOfMemoryError):
            return cls(MemoryError, str(error), (error.phase, error.requested))
        known = next((kind for kind in _KINDS if isinstance(error, kind)), None)
        name = "" if known else f"{type(error).__name__}: "
        return cls(known or RuntimeError, f"{name}{error}", None)

    def error(self, rank: int) -> Exception:
        message = f"rank {rank}: {self.message}"
        if self.shortage is not None:
            return OutOfMemoryError(message, *self.shortage)
        return self.kind(message)


class Group:
    """All processes of ``torch.distributed``, each of which makes the same calls of this library.

    As a context it holds a call: it succeeds in all processes or in none, and an exception in one
    is raised in the others with its message. It can be entered again inside. Whatever several
    processes do together begins with an :meth:`exchanged`, at which those that failed say so, so
    that nobody waits for tensors that will not come; between it and their way nothing is done that
    can fail: what needs room has it before. Small objects go by a gloo group of its own:
    that needs no GPU, and a process that died is noticed by its connection. Tensors of a GPU go by
    NCCL where the program has it.

    Warnings of the first process are shown as they come. Those of the others, where the first did
    not give the same, are shown by it at the end.

    Attributes:
        rank, size: of this process, and how many there are.
        world: the group of torch's that it stands for.
    """

    def __init__(self, world: Any) -> None:
        self.world = world
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._nccl = "nccl" in dist.get_backend_config(world)
        self._depth = 0
        self._known: BaseException | None = None  # a failure that all have heard of
        self._heard: BaseException | None = None  # one that was another process's
        self._ended_by_other = False  # the last call
        self._broken = False  # nobody can be told anything any more
        self._untold = False  # nor of what this call raised
        self._warned: dict[str, type[Warning]] = {}
        self._stack = contextlib.ExitStack()

    def __str__(self) -> str:
        """What is this process's own is labelled so."""
        return f"rank {self.rank} of {self.size}"

    def __enter__(self) -> Group:
        if self._depth == 0:
            self._warned, self._untold = {}, False
            self._stack.enter_context(self._noted_warnings())
        self._depth += 1
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        others: list[dict[str, type[Warning]]] = []
        try:
            if error is None:
                others = self.exchanged({} if self._depth else self._warned)
            else:
                self._tell(error)
        finally:
            if not self._depth:
                self._stack.close()
                self._ended_by_other = _comes_from(sys.exception(), self._heard)
                self._known = self._heard = None  # with their frames, and all that lies in these
        if self.rank == 0 and not self._depth:
            self._warn(others)

    def _tell(self, error: BaseException) -> None:
        """Let the others hear of an exception, where they have not."""
        if self._broken or self._untold or _comes_from(error, self._known):
            return
        self._known = error
        with contextlib.suppress(ConnectionError):  # the exception itself is what is raised
            self._gathered(_Failure.of(error), None)

    @contextlib.contextmanager
    def untold(self) -> Iterator[None]:
        """Inside, the others may wait for this process elsewhere: what is raised is not told.

        It ends the call at once, and the process as a rule. Then the others lose its connection,
        or their launcher ends them.
        """
        try:
            yield
        except BaseException:
            self._untold = True
            raise

    def exchanged(self, value: T) -> list[T]:
        """What every process gave, in the order of ranks. Collective.

        Raises what another process raised, of the same kind as far as that is a common one.
        ConnectionError where one is gone.
        """
        said = self._gathered(None, value)
        for rank, (failure, _) in enumerate(said):
            if failure is not None:
                self._known = self._heard = failure.error(rank)
                raise self._known
        return [value for _, value in said]

    def accounts(self, text: str) -> list[str | None]:
        """Of the errors that ended the last call, the ``text`` of every process that had its own.

        None for a process that heard of its error from another, and all None where not all can be
        asked any more. Collective, outside of the context.
        """
        unknown: list[str | None] = [None] * self.size
        if self._broken or self._untold:
            return unknown
        try:
            said = self._gathered(None, None if self._ended_by_other else text)
        except ConnectionError:
            return unknown
        return [text for _, text in said]

    def from_first(self, value: T) -> T:
        """What the first process gave, to the others a copy. Collective."""
        content = _pickled(value) if self.rank == 0 else b""
        size = self.exchanged(len(content))[0]
        raw = _room(size) if self.rank else _as_tensor(content)
        self.settle()  # all have room for it
        with self.lost():
            dist.broadcast(raw, 0, group=self._control)
        if self.rank == 0:
            return value
        copy: T = pickle.loads(raw.numpy().tobytes())
        return copy

    def gathered(self, content: bytes) -> list[Tensor]:
        """In the first process, the bytes of the others, which have none then. Collective."""
        mine = _as_tensor(content) if self.rank else None
        sizes = self.exchanged(len(content))
        found = [_room(size) for size in sizes[1:] if mine is None]
        self.settle()  # the first process has room for it
        if mine is not None:
            self.send(mine, 0)
            return []
        for rank, raw in enumerate(found, start=1):
            self.receive(raw, rank)
        return found

    def settle(self) -> None:
        """Wait for the others; raises where one of them failed. Collective."""
        self.exchanged(None)

    def summed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts over all processes. Collective."""
        said = self.exchanged(dict(counts))
        return {name: sum(each[name] for each in said) for name in counts}

    def beside(self) -> int:
        """How many of the processes are on this machine, which share its memory. Collective."""
        said = self.exchanged(_machine())
        return said.count(said[self.rank])

    def check_same(self, what: Mapping[str, object]) -> None:
        """ValueError in all processes, naming the first thing that is not the same in all."""
        said = self.exchanged(dict(what))
        first = said[0]
        for rank, theirs in enumerate(said):
            for name in [*first, *theirs] if first.keys() != theirs.keys() else []:
                if name not in theirs or name not in first:
                    has, lacks = (0, rank) if name in first else (rank, 0)
                    raise ValueError(
                        f"{name} is there on rank {has} and not on rank {lacks}; expected the same "
                        "on every rank"
                    )
            for name, value in theirs.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} is {value!r} on rank {rank} and {first[name]!r} on rank 0; "
                        "expected the same on every rank"
                    )

    def place(self, device: torch.device) -> torch.device:
        """Where a tensor of ``device`` lies while it is on its way between processes."""
        return device if self._nccl and device.type == "cuda" else torch.device("cpu")

    def reduce(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begin to add up a tensor of every process in that of ``rank``; the others lose theirs."""
        with self.lost():
            work: dist.Work = dist.reduce(tensor, rank, group=self._by(tensor), async_op=True)
            return work

    def broadcast(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begin to give every process the tensor of ``rank``."""
        with self.lost():
            work: dist.Work = dist.broadcast(tensor, rank, group=self._by(tensor), async_op=True)
            return work

    @property
    def broken(self) -> bool:
        """Whether a process is lost, so that nobody can be told anything any more."""
        return self._broken

    @property
    def uses_nccl(self) -> bool:
        """Whether tensors of a GPU go by NCCL."""
        return bool(self._nccl)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Give a tensor in host memory to one process."""
        with self.lost():
            dist.send(tensor, rank, group=self._control)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Take a tensor in host memory from one process."""
        with self.lost():
            dist.recv(tensor, rank, group=self._control)

    def wait(self, work: dist.Work) -> None:
        """Wait for what was begun; on a GPU its stream does, and the host goes on."""
        with self.lost():
            work.wait()

    def _by(self, tensor: Tensor) -> Any:
        return self.world if tensor.is_cuda else self._control

    def _gathered(self, failure: _Failure | None, value: Any) -> list[tuple[_Failure | None, Any]]:
        """Of every process both. Where all have nothing to say, at the cost of one number."""
        nothing = failure is None and value is None
        mine = b"" if nothing else _pickled((failure, value))
        with self.lost():
            length = torch.tensor(len(mine), dtype=torch.int64, device="cpu")
            dist.all_reduce(length, dist.ReduceOp.MAX, group=self._control)
            if not length:
                return [(None, None)] * self.size
            raw = torch.zeros(int(length), dtype=torch.uint8, device=length.device)
            raw.numpy()[: len(mine)] = memoryview(mine)
            said = [torch.empty_like(raw) for _ in range(self.size)]
            dist.all_gather(said, raw, group=self._control)
        # A pickle does not begin with 0, and ends where it ends.
        files = [io.BytesIO(each.numpy().tobytes()) if each[0] else None for each in said]
        return [(None, None) if file is None else pickle.load(file) for file in files]

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """An error of torch.distributed, in words that name what to look for."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._broken = True
            raise ConnectionError(
                f"{self} lost another process, which ended or did not "
                f"make the same call within {TIMEOUT} ({error}); expected every rank to call this "
                "function"
            ) from error

    @contextlib.contextmanager
    def _noted_warnings(self) -> Iterator[None]:
        show = warnings.showwarning

        def note(message: Any, category: Any, *place: Any, **more: Any) -> None:
            # Python's own, of which it is one: every process knows it.
            own = next(each for each in category.__mro__ if each.__module__ == "builtins")
            self._warned[str(message)] = own
            if self.rank == 0:
                show(message, category, *place, **more)

        warnings.showwarning = note
        try:
            yield
        finally:
            warnings.showwarning = show

    def _warn(self, said: list[dict[str, type[Warning]]]) -> None:
        """Warnings that only other processes gave, each once."""
        shown = set(self._warned)
        for rank, texts in enumerate(said):
            for text, category in texts.items():
                if text not in shown:
                    warnings.warn(f"rank {rank}: {text}", category, stacklevel=3)
            shown |= texts.keys()


def _comes_from(error: BaseException | None, other: BaseException | None) -> bool:
    """Whether an error is another one, or was raised from it."""
    at = error
    while at is not None and at is not other:
        at = at.__cause__
    return at is not None


class _Pickler(pickle.Pickler):
    """Tensors in host memory as numpy's arrays: torch's own way takes 0.2 ms for each."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or value.dtype not in _NUMPY:
            return NotImplemented
        if value.requires_grad or value.layout != torch.strided or value.is_neg():
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return file.getvalue()


def _room(size: int) -> Tensor:
    """Bytes in host memory, whatever the program's default device is."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _machine() -> str:
    """A name of this machine until it is started again; containers have a hostname each."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return platform.node()


_group: Group | None = None


def current() -> Group | None:
    """The processes of this program; None where it is the only one, or torch.distributed is off.

    Collective when it is first called.
    """
    global _group
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _group is None or _group.world is not dist.group.WORLD:
        _group = Group(dist.group.WORLD)
    return _group


def joined(model: T) -> tuple[T, Group | None]:
    """The model without the wrapper of DistributedDataParallel, and :func:`current`."""
    group = current()
    if group is not None and isinstance(model, DistributedDataParallel):
        model = model.module
    return model, group
