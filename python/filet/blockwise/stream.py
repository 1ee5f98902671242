"""Groups of weights on a device in turn, the next one loading while one is in use.

A thread has the files read into two pinned buffers and copies these to the device, into the one of
two places that the group now computing does not use. Packed weights are copied as they are. Weights
that are to be quantised come one by one to a place of their own, and from there into theirs.

Of several processes each reads its share of a group (:mod:`filet.blockwise.division`), and then all
give the others theirs: as bytes, whatever the weights are.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from filet.blockwise.division import ALIGNMENT, Division, divided, size_of
from filet.blockwise.weights import Stored, WeightSource
from filet.distributed.channel import Channel
from filet.model.checkpoint import Entry
from filet.model.packed import Packed
from filet.system.transfer import Staging

__all__ = ["Groups", "Loading", "WeightStream", "whole_bytes"]

Groups = Sequence[Sequence[Entry]]  # of weights that are on the device together
_PIECE = 2**27  # bytes of a pinned buffer


def whole_bytes(group: Sequence[Entry]) -> int:
    """Bytes of the largest weight of a group that is quantised on its way: of its place before."""
    return max((entry.nbytes for entry in group if _quantised(entry)), default=0)


class WeightStream:
    """Groups of weights on a device in turn, the next one loading while one is in use.

    ``waited`` is how long the device (on a CPU: the caller) had nothing to do because weights were
    not there, in seconds; on a GPU it is taken from events when :meth:`settle` is called.
    """

    def __init__(
        self,
        source: WeightSource,
        device: torch.device,
        piece: int = _PIECE,
        channel: Channel | None = None,
    ) -> None:
        """``piece``: bytes of each pinned buffer. ``channel``: to those who load with this one."""
        self.source = source
        self.device = device
        self.piece = piece
        self.channel = channel
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

    def divided(self, group: Sequence[Entry]) -> Division:
        """Who reads what of a group; everything is this process's where nothing can travel."""
        channel = self.channel
        if channel is None or not channel.carries(self.device):
            return Division(group, [], [])
        return divided(group, channel.group.size, self.source.made_with)

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
        self.groups = [weights.divided(group) for group in groups]
        self.device = weights.device
        self._next = 0
        self._used: Tensor | None = None  # the place of the group that is in the model
        self._in_model = contextlib.ExitStack()
        self._free: queue.Queue[Any] = queue.Queue()
        self._ready: queue.Queue[Any] = queue.Queue()
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        # Before the places, whose events say when the memory is the loader's.
        whole = max(map(whole_bytes, groups), default=0)
        self._whole = torch.empty(whole, dtype=torch.uint8, device=self.device)
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
            if loaded is None:
                self._raise_what_others_did()
            place, event = loaded
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        index, self._next, self._used = self._next, self._next + 1, place
        self._in_model.enter_context(_placed(self.groups[index].group, place))
        return index

    def close(self) -> None:
        """Take the weights out of the model, stop the loader where it is, and free the places."""
        self._in_model.close()
        self._used = None  # not the loader's any more: it would begin what no other process does
        self._free.put(None)
        self._loader.join()
        if self._stream is not None:  # before the places become somebody else's memory
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        # Whoever still holds this object holds no places: 3.9 GiB of a 70B's embedding and head.
        self._free, self._ready = queue.Queue(), queue.Queue()
        self._whole = torch.empty(0, dtype=torch.uint8, device="cpu")

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

    def _raise_what_others_did(self) -> None:
        channel = self.weights.channel
        assert channel is not None
        channel.group.settle()
        raise RuntimeError("another process gave up its weights without an error of its own")

    def _load(self) -> None:
        channel = self.weights.channel
        try:
            with contextlib.ExitStack() as stack:
                staging = None
                if self._stream is not None:
                    stack.enter_context(torch.cuda.device(self.device))
                    stack.enter_context(torch.cuda.stream(self._stream))
                    staging = Staging(self.weights.piece)
                for division in self.groups:
                    taken = self._free.get()
                    if taken is None:
                        if channel is not None:
                            channel.stop()
                        return
                    place, event = taken
                    if not self._fill(division, place, event, staging):
                        self._ready.put(None)
                        return
        except BaseException as error:
            self._ready.put(error)

    def _fill(self, division: Division, place: Tensor, event: Any, staging: Staging | None) -> bool:
        """Have a group in a place, and say so; False where another process failed."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        channel = self.weights.channel
        start = time.perf_counter()
        try:
            self._fill_place(division, place, staging)
        except BaseException:
            if channel is not None:
                channel.stop()
            raise
        if channel is not None:
            if not channel.agreed():
                return False
            channel.share(place, division.cuts)
        there = None
        if staging is not None:
            there = torch.cuda.Event()
            there.record()
        self.weights.loading = time.perf_counter() - start
        self._ready.put((place, there))
        return True

    def _fill_place(self, division: Division, place: Tensor, staging: Staging | None) -> None:
        """Have this process's share of a group read into a place.

        Weights to be quantised by way of their own.
        """
        # Of what is read: its goal, from which of its elements on, who quantises that, into what.
        ways: dict[int, tuple[Tensor, int, Packed | None, Mapping[str, Tensor]]] = {}
        wanted: list[Entry] = []
        for entry, parts, mine in self._mine(division, place):
            stored = entry.stored
            if (packed := _quantised(entry)) is not None:
                wanted += stored
                ways[id(entry)] = _view(entry, self._whole, 0), 0, packed, parts
                continue
            for each, view in zip(stored, parts.values(), strict=True):
                start, stop = _overlap(view, place, mine)
                if start < stop or not view.numel():
                    wanted.append(each)
                    ways[id(each)] = view.view(-1)[start:stop], start, None, parts
        for entry, values in self.weights.source.tensors(wanted):
            goal, start, packed, views = ways.pop(id(entry))
            if staging is not None:
                staging.send(goal, partial(_fill, values=values, start=start))
            else:
                _fill(goal.view(-1), 0, values, start)
            if packed is not None:
                self._quantise(packed, goal, views)
        assert not ways  # the source gave every entry

    def _mine(
        self, division: Division, place: Tensor
    ) -> Iterator[tuple[Entry, dict[str, Tensor], tuple[int, int]]]:
        """The weights that this process reads, their places, and which bytes of the place."""
        everything = (0, place.numel())
        channel, mine = self.weights.channel, everything
        if channel is not None and division.cuts:
            mine = division.range_of(channel.group.rank)
        for index, (entry, views) in enumerate(
            zip(division.group, _views(division.group, place), strict=True)
        ):
            if index >= len(division.whole):
                yield entry, views, mine
            elif channel is not None and division.whole[index] == channel.group.rank:
                yield entry, views, everything

    def _quantise(self, packed: Packed, whole: Tensor, views: Mapping[str, Tensor]) -> None:
        if self._stream is None:
            return packed.quantise(whole, views)
        # bitsandbytes quantises on the default stream, whichever is the current one. That gets no
        # work that would have to wait for the copy: the host does.
        torch.cuda.current_stream(self.device).synchronize()
        default = torch.cuda.default_stream(self.device)
        with torch.cuda.stream(default):
            packed.quantise(whole, views)
        return torch.cuda.current_stream(self.device).wait_stream(default)


def _fill(goal: Tensor, first: int, values: Tensor | Stored, start: int) -> None:
    """``goal``, flat and on the CPU, with the elements of ``values`` from ``start + first`` on."""
    start += first
    if isinstance(values, Stored):
        values.read(start, goal)
    else:
        goal.copy_(values.reshape(-1)[start : start + goal.numel()])  # by all of torch's threads


def _quantised(entry: Entry) -> Packed | None:
    """How, of a weight that is quantised on the way to the device."""
    packed = entry.packed
    return packed if isinstance(packed, Packed) and packed.quantises else None


def _view(entry: Entry, place: Tensor, offset: int) -> Tensor:
    return place[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape)


def _overlap(view: Tensor, place: Tensor, mine: tuple[int, int]) -> tuple[int, int]:
    """Which elements of a view of the place lie among these of its bytes."""
    offset, size = view.data_ptr() - place.data_ptr(), view.element_size()
    start, stop = (min(max(each - offset, 0), view.nbytes) // size for each in mine)
    return start, stop


def _views(group: Sequence[Entry], place: Tensor) -> list[dict[str, Tensor]]:
    """The parts of each entry, where they lie in a place."""
    views: list[dict[str, Tensor]] = []
    offset = 0
    for entry in group:
        views.append({})
        for name, part in entry.parts.items():
            views[-1][name] = _view(part, place, offset)
            offset += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return views


@contextlib.contextmanager
def _placed(group: Sequence[Entry], place: Tensor) -> Iterator[None]:
    """The model's weights of this group are in ``place``; afterwards what they were before."""
    with contextlib.ExitStack() as undo:
        for entry, views in zip(group, _views(group, place), strict=True):
            if entry.packed is not None:
                undo.enter_context(entry.packed.placed(views))
                continue
            view = views[""]
            value = nn.Parameter(view, requires_grad=False)
            for module, key in entry.places:
                parameter = key in module._parameters
                own: dict[str, Any] = module._parameters if parameter else module._buffers
                undo.callback(own.__setitem__, key, own[key])
                own[key] = value if parameter else view
        yield
