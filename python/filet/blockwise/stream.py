"""Groups of weights on a device in turn, the next one loading while one is in use.

A thread has the files read into two pinned buffers and copies these to the device, into the one of
two places that the group now computing does not use.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from filet.blockwise.weights import Stored, WeightSource
from filet.model.checkpoint import Entry

__all__ = ["Groups", "Loading", "WeightStream", "size_of"]

Groups = Sequence[Sequence[Entry]]  # of weights that are on the device together
_ALIGNMENT = 256  # bytes: what the allocator itself gives, and TMA and vector loads ask for
_PIECE = 2**27  # bytes of a pinned buffer


def size_of(group: Sequence[Entry]) -> int:
    """Bytes of a group in memory."""
    return sum(-(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT for entry in group)


class WeightStream:
    """Groups of weights on a device in turn, the next one loading while one is in use.

    ``waited`` is how long the device (on a CPU: the caller) had nothing to do because weights were
    not there, in seconds; on a GPU it is taken from events when :meth:`settle` is called.
    """

    def __init__(self, source: WeightSource, device: torch.device, piece: int = _PIECE) -> None:
        """``piece``: bytes of each pinned buffer."""
        self.source = source
        self.device = device
        self.piece = piece
        self.waited = 0.0
        self.loading = 0.0  # seconds that the loading thread took for the last group
        self._ahead: Loading | None = None  # what the next sweep begins with
        self._events: list[tuple[Any, Any]] = []

    def settle(self) -> float:
        """``waited``, after the device has done everything."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self.waited += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events.clear()
        return self.waited

    def load_ahead(self, groups: Groups) -> None:
        """Start to load what the next sweep begins with, during the end of this one."""
        self._ahead = Loading(self, groups)

    def loaded(self, groups: Groups) -> Loading:
        """Groups of weights, the first two loading at once; to be iterated and closed.

        They may be under way already, by :meth:`load_ahead`.
        """
        ahead, self._ahead = self._ahead, None
        return ahead or Loading(self, groups)

    def drop_ahead(self) -> None:
        """Stop what is loading ahead and was not asked for."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what the device waits inside."""
        # Between the two events of a GPU's stream there is nothing but the wait for the weights,
        # by the stream itself or by the host that had no work for it.
        before = self._timestamp()
        yield
        after = self._timestamp()
        if self.device.type == "cuda":
            self._events.append((before, after))
        else:
            self.waited += after - before

    def _timestamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Loading:
    """Gives each group's index with its weights in the model; they leave it with the next."""

    def __init__(self, weights: WeightStream, groups: Groups) -> None:
        self.weights = weights
        self.groups = groups
        self.device = weights.device
        self._next = 0
        self._used: Tensor | None = None  # the place of the group that is in the model
        self._in_model = contextlib.ExitStack()
        self._free: queue.Queue[Any] = queue.Queue()
        self._ready: queue.Queue[Any] = queue.Queue()
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        size = max(map(size_of, groups), default=0)
        for _ in range(min(2, len(groups))):
            self._give(torch.empty(size, dtype=torch.uint8, device=self.device))
        self._loader = threading.Thread(target=self._load, name="filet weights", daemon=True)
        self._loader.start()

    def __iter__(self) -> Loading:
        return self

    def __next__(self) -> int:
        self._leave()
        if self._next == len(self.groups):
            raise StopIteration
        with self.weights.waiting():
            loaded = self._ready.get()
            if isinstance(loaded, BaseException):
                raise loaded
            place, event = loaded
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        index, self._next, self._used = self._next, self._next + 1, place
        self._in_model.enter_context(_placed(self.groups[index], place))
        return index

    def close(self) -> None:
        """Take the weights out of the model, stop the loader where it is, and free the places."""
        self._leave()
        self._free.put(None)
        self._loader.join()
        if self._stream is not None:  # before the places become somebody else's memory
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        # Whoever still holds this object holds no places: 3.9 GiB of a 70B's embedding and head.
        self._free, self._ready = queue.Queue(), queue.Queue()

    def _leave(self) -> None:
        self._in_model.close()
        if self._used is not None:
            self._give(self._used)
            self._used = None

    def _give(self, place: Tensor) -> None:
        """A place to the loader, for when the device has done what it does with it now."""
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self._free.put((place, event))

    def _load(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                staging = None
                if self._stream is not None:
                    stack.enter_context(torch.cuda.device(self.device))
                    stack.enter_context(torch.cuda.stream(self._stream))
                    staging = _Staging(self.weights.piece)
                for group in self.groups:
                    taken = self._free.get()
                    if taken is None:
                        return
                    place, event = taken
                    if event is not None:
                        torch.cuda.current_stream(self.device).wait_event(event)
                    start = time.perf_counter()
                    views = dict(zip(map(id, group), _views(group, place), strict=True))
                    for entry, values in self.weights.source.tensors(group):
                        view = views.pop(id(entry))
                        if staging is not None:
                            staging.send(values, view)
                        else:
                            _fill(view.view(-1), values, 0)
                    assert not views  # the source gave every entry
                    if staging is not None:
                        event = torch.cuda.Event()
                        event.record()
                    self.weights.loading = time.perf_counter() - start
                    self._ready.put((place, event))
        except BaseException as error:
            self._ready.put(error)


class _Staging:
    """Two pinned buffers between files or pageable memory and a GPU's current stream."""

    def __init__(self, piece: int) -> None:
        self._piece = piece
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events: list[Any] = [None, None]
        self._next = 0

    def send(self, values: Tensor | Stored, view: Tensor) -> None:
        goal = view.view(-1)
        step = self._piece // view.element_size()
        for start in range(0, goal.numel(), step):
            piece = goal[start : start + step]
            index, self._next = self._next, 1 - self._next
            if self._events[index] is not None:
                self._events[index].synchronize()
            staged = self._buffers[index].view(view.dtype)[: piece.numel()]
            _fill(staged, values, start)
            piece.copy_(staged, non_blocking=True)
            self._events[index] = torch.cuda.Event()
            self._events[index].record()


def _fill(goal: Tensor, values: Tensor | Stored, start: int) -> None:
    """``goal``, flat and on the CPU, with the elements of ``values`` from ``start`` on."""
    if isinstance(values, Stored):
        values.read(start, goal)
    else:
        goal.copy_(values.reshape(-1)[start : start + goal.numel()])  # by all of torch's threads


def _views(group: Sequence[Entry], place: Tensor) -> list[Tensor]:
    views, offset = [], 0
    for entry in group:
        raw = place[offset : offset + entry.nbytes]
        views.append(raw.view(entry.dtype).view(entry.shape))
        offset += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views


@contextlib.contextmanager
def _placed(group: Sequence[Entry], place: Tensor) -> Iterator[None]:
    """The model's weights of this group are in ``place``; afterwards what they were before."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for entry, view in zip(group, _views(group, place), strict=True):
            value = nn.Parameter(view, requires_grad=False)
            for module, key in entry.places:
                parameter = key in module._parameters
                own: dict[str, Any] = module._parameters if parameter else module._buffers
                undo.append((own, key, own[key]))
                own[key] = value if parameter else view
        yield
    finally:
        for own, key, old in reversed(undo):
            own[key] = old
