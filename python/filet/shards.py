"""A model's weights from its safetensors shards, a group of them at a time, ahead of their use.

A thread has the files read into two pinned buffers, by several threads at a time, and copies these
to the device, into the one of two places that the group now computing does not use. The files are
not memory-mapped: a disk that fails, or a file that has become shorter, is then an exception and
not a signal, and nothing depends on what a kernel makes of page faults. From the page cache, one
thread is as quick either way.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from filet.files import read_at
from filet.folder import check_shapes, missing_weight, natural, understood, warn_of_unused
from filet.tensorfile import DTYPES

__all__ = [
    "Entry",
    "Loading",
    "ShardedWeights",
    "Stored",
    "WeightSource",
    "WeightStream",
    "check_numbers",
    "entries",
    "size_of",
]

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")  # one file, or several's index
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What a weight may be in a file. Whole numbers, or floating ones of 8 bits, are a quantised
# weight's, and mean nothing without their scales: transformers would take them as they are.
_NUMBERS = ("float64", "float32", "float16", "bfloat16")
_ALIGNMENT = 256  # bytes: what the allocator itself gives, and TMA and vector loads ask for
_PIECE = 2**27  # bytes of a pinned buffer
_READERS = 8  # threads that read a piece, each its share,
_SHARE = 2**20  # of at least so many bytes
_SAMPLES = 64  # pieces of 4 KiB of each file that enter its identity


@dataclass(frozen=True)
class Entry:
    """A weight (a parameter or persistent buffer) and everywhere the model keeps it.

    ``dtype`` is what it has in memory. Tied weights are one entry with several names.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read in parts."""

    path: Path
    file: int  # descriptor
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    readers: ThreadPoolExecutor

    def read(self, start: int, goal: Tensor) -> None:
        """The elements from ``start`` on into ``goal``: contiguous, on the CPU, of any dtype."""
        raw = goal if goal.dtype == self.dtype else torch.empty(goal.shape, dtype=self.dtype)
        array: Any = raw.view(-1).view(torch.uint8).numpy()
        whole = memoryview(array)
        offset = self.offset + start * self.dtype.itemsize
        share = max(_SHARE, -(-len(whole) // _READERS))
        parts = [(whole[at : at + share], offset + at) for at in range(0, len(whole), share)]
        if len(parts) == 1:
            self._read(parts[0])
        else:
            for _ in self.readers.map(self._read, parts):
                pass  # it raises what went wrong
        if raw is not goal:
            goal.copy_(raw)

    def _read(self, part: tuple[memoryview, int]) -> None:
        read_at(self.file, self.path, *part)

    def tensor(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, result)
        return result


class WeightSource(Protocol):
    """Where weights come from."""

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor | Stored]]:
        """Each wanted entry once, in any order, with its values: of any dtype, on the CPU."""

    def identity(self) -> dict[str, Any]:
        """JSON-able; equal for equal weights."""


def entries(model: nn.Module) -> list[Entry]:
    """All weights of a model (on the meta device), tied ones once, in the model's order."""
    # What transformers keeps in float32 in a model of half precision.
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    keep: set[str] = set()
    if dtypes & {torch.float16, torch.bfloat16}:
        keep |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if torch.float16 in dtypes:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    float32 = [re.compile(rf"(^|\.){re.escape(part)}(\.|$)") for part in keep]
    found: dict[int, tuple[Tensor, list[str], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        own: dict[str, Tensor | None] = dict(module._parameters)
        own |= {
            key: value
            for key, value in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, value in own.items():
            if value is None:
                continue
            _, names, places = found.setdefault(id(value), (value, [], []))
            names.append(f"{path}.{key}" if path else key)
            places.append((module, key))
    result = []
    for value, names, places in found.values():
        dtype = value.dtype
        if dtype.is_floating_point and any(part.search(names[0]) for part in float32):
            dtype = torch.float32
        result.append(Entry(tuple(names), value.shape, dtype, tuple(places)))
    return result


def size_of(group: Sequence[Entry]) -> int:
    """Bytes of a group in memory."""
    return sum(-(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT for entry in group)


class ShardedWeights:
    """The safetensors files of a model's folder.

    Names are those of ``model``, which is on the meta device: those in the files with the base
    model's prefix added or dropped, and renamed, stacked or split (experts, say) as transformers
    does it on loading.

    Raises FileNotFoundError for a folder without safetensors weights, ValueError for a shard that
    is missing or damaged, and for a weight that no file has, or that is quantised or has another
    shape. Warns of what the model does not use. The files are open as long as this is there.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        self.folder = Path(folder)
        self.files = shard_files(self.folder)
        self._stored: dict[str, Stored] = {}
        headers: dict[str, _Header] = {}
        readers = ThreadPoolExecutor(_READERS, "filet reading")
        for path in self.files:
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            for key, header in _headers(path).items():
                headers[key] = header
                self._stored[key] = Stored(
                    path, file, header.offset, header.shape, header.dtype, readers
                )
        self._model: Any = model
        with understood(self.folder):
            self._names = _Names(model, headers)
        _check_numbers(self.folder, model, self._names, headers)
        shapes = ((self._name(entry), entry.shape) for entry in entries(model))
        check_shapes(
            self.folder, ((name, self._names.shape(name), shape) for name, shape in shapes)
        )
        warn_of_unused(self.folder, model, self._names.unused)

    def _name(self, entry: Entry) -> str:
        """The one of an entry's names that the files know."""
        name = self._names.of(entry)
        if name is None:
            raise missing_weight(self.folder, [entry.names[0]])
        return name

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor | Stored]]:
        by_name = {self._name(entry): entry for entry in wanted}
        while by_name:
            name = next(iter(by_name))
            if name in self._names.plain:
                yield by_name.pop(name), self._stored[self._names.plain[name]]
                continue
            conversion = self._names.converted[name]
            made = conversion.run(self._model, lambda key: self._stored[key].tensor())
            for each in [each for each in made if each in by_name]:
                yield by_name.pop(each), made[each]

    def identity(self) -> dict[str, Any]:
        return {path.name: _file_identity(path) for path in [*self.files, *_configs(self.folder)]}


def check_numbers(folder: Path, make: Callable[[], nn.Module], *, pickled: bool) -> None:
    """ValueError for a weight in the files that is quantised, before any is read.

    ``make`` gives the model on the meta device, for its names; it is called only where a file has
    other than floating numbers (masks and counts may be such). ``pickled``: pickles are read, where
    there are no safetensors; of a folder without files transformers says that there are none.
    """
    try:
        files, read = shard_files(folder), _headers
    except FileNotFoundError:
        files, read = (_listed(folder, *_PICKLED) if pickled else []), _pickled_headers
    headers = {key: header for path in files for key, header in read(path).items()}
    if all(header.kind in _NUMBERS for header in headers.values()):
        return
    model = make()
    _check_numbers(folder, model, _Names(model, headers), headers)


def _check_numbers(
    folder: Path, model: nn.Module, names: _Names, headers: Mapping[str, _Header]
) -> None:
    for entry in entries(model):
        if not entry.dtype.is_floating_point:
            continue
        for key in names.keys_of(entry):
            if headers[key].kind not in _NUMBERS:
                raise ValueError(
                    f"{key} is {headers[key].kind} in {folder}, and config.json has no "
                    f"quantization_config that says what it means; expected {', '.join(_NUMBERS)}"
                )


class _Names:
    """Which keys of the files make which weights of a model, as transformers loads them."""

    def __init__(self, model: Any, headers: Mapping[str, _Header]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.plain: dict[str, str] = {}  # name in the model -> key in the files
        self.converted: dict[str, _Conversion] = {}
        self.unused: set[str] = set()  # names that the model does not have
        self._shapes = {key: header.shape for key, header in headers.items()}
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = getattr(model, "base_model_prefix", "") or None
        state = model.state_dict()
        conversions: dict[str, _Conversion] = {}
        for key in sorted(headers, key=natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state:
                targets = [] if pattern is None else by_pattern[pattern].target_patterns
                self.unused |= {name.replace(targets[0], each) for each in targets} or {name}
            elif pattern is None:
                self.plain[name] = key
            else:
                conversion = conversions.setdefault(name, _Conversion(name, by_pattern[pattern]))
                conversion.sources.append((key, pattern))
        for conversion in conversions.values():
            made = conversion.run(model, lambda key: headers[key].meta())
            for name, value in made.items():
                self.converted[name] = conversion
                conversion.shapes[name] = value.shape

    def of(self, entry: Entry) -> str | None:
        """The one of an entry's names that the files know."""
        known = (name for name in entry.names if name in self.plain or name in self.converted)
        return next(known, None)

    def shape(self, name: str) -> torch.Size:
        if name in self.plain:
            return self._shapes[self.plain[name]]
        return self.converted[name].shapes[name]

    def keys_of(self, entry: Entry) -> list[str]:
        """The keys that make an entry; none where it is missing."""
        name = self.of(entry)
        if name is None:
            return []
        if name in self.plain:
            return [self.plain[name]]
        return [key for key, _ in self.converted[name].sources]


@dataclass(eq=False)
class _Conversion:
    """One use of a transformers ``WeightConverter``: several keys of the files into weights."""

    name: str
    converter: Any

    def __post_init__(self) -> None:
        self.sources: list[tuple[str, str]] = []  # key in the files, pattern that it matched
        self.shapes: dict[str, torch.Size] = {}

    def run(self, model: Any, tensor: Any) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.name, key, pattern, tensor(key))
        made = converter.convert(self.name, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, by its index or the single one."""
    files = _listed(folder, *_SAFETENSORS)
    if not files:
        raise FileNotFoundError(
            f"no {' or '.join(_SAFETENSORS)} in {folder}; the blockwise engine reads safetensors "
            "weights only"
        )
    return files


def _listed(folder: Path, single: str, index: str) -> list[Path]:
    """The files that the index names, or the single one; none where neither is there."""
    if (folder / index).is_file():
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: no file {missing[0]}, which {index} names")
        return [folder / name for name in names]
    return [folder / single] if (folder / single).is_file() else []


@dataclass(frozen=True)
class _Header:
    """What a file says of a tensor in it. ``kind`` is its dtype's name, torch's where it has one.

    ``dtype`` stands in for those that torch does not compute with, which no model gets.
    """

    kind: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _headers(path: Path) -> dict[str, _Header]:
    """Of each tensor in a safetensors file."""
    try:
        with safe_open(str(path), framework="pt"):
            pass  # which has checked the whole header, also against the file's size
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    result = {}
    for key, value in header.items():
        if key == "__metadata__":
            continue
        dtype = DTYPES.get(value["dtype"])
        kind = value["dtype"] if dtype is None else str(dtype).removeprefix("torch.")
        offset = 8 + size + value["data_offsets"][0]
        result[key] = _Header(kind, dtype or torch.uint8, torch.Size(value["shape"]), offset)
    return result


def _pickled_headers(path: Path) -> dict[str, _Header]:
    """Of each tensor in a pickle, without its data."""
    return {
        key: _Header(str(value.dtype).removeprefix("torch."), value.dtype, value.shape, 0)
        for key, value in torch.load(path, map_location="meta", weights_only=True).items()
        if isinstance(value, Tensor)
    }


def _configs(folder: Path) -> list[Path]:
    return [folder / "config.json"]


def _file_identity(path: Path) -> str:
    """Size and hash of a file's beginning, end and pieces between, without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(2**20))  # of a shard, its header with every name and shape
        for piece in range(_SAMPLES + 1):
            file.seek(max(size - 4096, 0) * piece // _SAMPLES)
            digest.update(file.read(4096))
    return f"{size}:{digest.hexdigest()}"


class WeightStream:
    """Groups of weights on a device in turn, the next one loading while one is in use.

    ``waited`` is how long the device (on a CPU: the caller) had nothing to do because weights were
    not there, in seconds; on a GPU it is taken from events when :meth:`settle` is called.
    """

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.waited = 0.0
        self.loading = 0.0  # seconds that the loading thread took for the last group
        self._events: list[tuple[Any, Any]] = []

    def settle(self) -> float:
        """``waited``, after the device has done everything."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self.waited += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events.clear()
        return self.waited

    def run(self, groups: Sequence[Sequence[Entry]]) -> Loading:
        """Start to load groups of weights, the first two at once; to be iterated and closed."""
        return Loading(self, groups)

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

    def __init__(self, weights: WeightStream, groups: Sequence[Sequence[Entry]]) -> None:
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
        """Take the weights out of the model, and stop the loader where it is."""
        self._leave()
        self._free.put(None)
        self._loader.join()
        if self._stream is not None:  # before the places become somebody else's memory
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

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
                    staging = _Staging()
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

    def __init__(self) -> None:
        self._buffers = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events: list[Any] = [None, None]
        self._next = 0

    def send(self, values: Tensor | Stored, view: Tensor) -> None:
        goal = view.view(-1)
        step = _PIECE // view.element_size()
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
