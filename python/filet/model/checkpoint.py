"""The weights in a model's folder: what its files say of them, and their names in the model.

A weight that no file has, or that is quantised without a word of it in config.json, is an error
here: transformers would fill in random numbers, or take the numbers as they are.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from filet.model.gptq import Buffers, is_gptqmodel
from filet.model.packed import Packed, packed_of
from filet.system.tensorfile import DTYPES

__all__ = [
    "Entry",
    "Header",
    "Names",
    "check_codes",
    "check_kinds",
    "check_numbers",
    "check_shapes",
    "entries",
    "headers_of",
    "missing_weight",
    "natural",
    "shard_files",
    "understood",
    "warn_of_unused",
]

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")  # one file, or several's index
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# What a weight may be in a file. Whole numbers, or floating ones of 8 bits, are a quantised
# weight's, and mean nothing without their scales: transformers would take them as they are.
_NUMBERS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Entry:
    """A weight (a parameter or persistent buffer) and everywhere the model keeps it.

    ``shape`` and ``dtype`` are what it has in memory; of a weight that is quantised on its way
    there, what it is read as. Tied weights are one entry with several names.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    places: tuple[tuple[nn.Module, str], ...]
    packed: Packed | Buffers | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def parts(self) -> dict[str, Entry]:
        """What lies in memory, by name; of a plain weight itself."""
        if self.packed is None:
            return {"": self}
        path = self.names[0].rpartition(".")[0]
        return {
            name: Entry((f"{path}.{name}",), value.shape, value.dtype, ())
            for name, value in self.packed.parts.items()
        }

    @property
    def whole(self) -> bool:
        """Whether the files have it as it is, and not in :attr:`parts`."""
        return self.packed is None or self.packed.quantises

    @property
    def stored(self) -> list[Entry]:
        """What is read of it."""
        return [self] if self.whole else list(self.parts.values())


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
        if is_gptqmodel(module):
            own = {"qweight": own["qweight"]}  # stands for all that the layer has
        for key, value in own.items():
            if value is None:
                continue
            _, names, places = found.setdefault(id(value), (value, [], []))
            names.append(f"{path}.{key}" if path else key)
            places.append((module, key))
    result = []
    quantizer = getattr(model, "hf_quantizer", None)
    for value, names, places in found.values():
        packed = packed_of(places[0][0], value, quantizer)
        if packed is not None:
            part = packed.stored_weight
            result.append(Entry(tuple(names), part.shape, part.dtype, tuple(places), packed))
            continue
        dtype = value.dtype
        if dtype.is_floating_point and any(part.search(names[0]) for part in float32):
            dtype = torch.float32
        result.append(Entry(tuple(names), value.shape, dtype, tuple(places)))
    return result


def check_numbers(folder: Path, make: Callable[[], nn.Module], *, pickled: bool) -> None:
    """ValueError for a weight in the files that is quantised, before any is read.

    ``make`` gives the model on the meta device, for its names; it is called only where a file has
    other than floating numbers (masks and counts may be such). ``pickled``: pickles are read, where
    there are no safetensors; of a folder without files transformers says that there are none.
    """
    try:
        files, read = shard_files(folder), headers_of
    except FileNotFoundError:
        files, read = (_listed(folder, *_PICKLED) if pickled else []), _pickled_headers
    headers = {key: header for path in files for key, header in read(path).items()}
    if all(header.kind in _NUMBERS for header in headers.values()):
        return
    model = make()
    check_kinds(folder, model, Names(model, headers), headers)


def check_kinds(
    folder: Path, model: nn.Module, names: Names, headers: Mapping[str, Header]
) -> None:
    for entry in entries(model):
        if not entry.dtype.is_floating_point:
            continue
        for key in names.keys_of(entry):
            known = key in names.dequantised or headers[key].dtype == entry.dtype
            if headers[key].kind not in _NUMBERS and not known:
                raise ValueError(
                    f"{key} is {headers[key].kind} in {folder}, and config.json has no "
                    f"quantization_config that says what it means; expected {', '.join(_NUMBERS)}"
                )


def check_codes(folder: Path) -> None:
    """ValueError for GPTQ's or AWQ's codes that are no whole numbers, or of groups that are not.

    transformers would cast the ones, and the layer takes the groups' scales from the end, or none.
    """
    files = {path: headers_of(path) for path in _listed(folder, *_SAFETENSORS)}
    groups = {
        key.removesuffix(".scales"): header.shape[0]
        for headers in files.values()
        for key, header in headers.items()
        if key.endswith(".scales")
    }
    for path, headers in files.items():
        with safe_open(str(path), framework="pt") as file:
            for key, header in headers.items():
                stem, _, part = key.rpartition(".")
                if stem not in groups or part not in ("qweight", "qzeros", "g_idx"):
                    continue
                if not header.kind.startswith("int"):
                    raise ValueError(f"{key} is {header.kind} in {folder}; expected int32")
                if part == "g_idx" and header.shape.numel():
                    first, last = map(int, file.get_tensor(key).aminmax())
                    if first < 0 or last >= groups[stem]:
                        raise ValueError(
                            f"{key} has numbers from {first} to {last} in {folder}; expected 0 to "
                            f"{groups[stem] - 1}, the rows of {stem}.scales"
                        )


class Names:
    """Which keys of the files make which weights of a model, as transformers loads them."""

    def __init__(self, model: Any, headers: Mapping[str, Header]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.plain: dict[str, str] = {}  # name in the model -> key in the files
        self.converted: dict[str, _Conversion] = {}
        self.unused: set[str] = set()  # names that the model does not have
        self.dequantised: set[str] = set()  # keys that become numbers together with their scales
        self._shapes = {key: header.shape for key, header in headers.items()}
        quantizer = getattr(model, "hf_quantizer", None)
        if not getattr(getattr(quantizer, "quantization_config", None), "dequantize", False):
            quantizer = None
        transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
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
            keys = [key for key, _ in conversion.sources]
            if quantizer is not None and len(keys) == 1:  # it has no scales: it is what it is
                self.plain[conversion.name] = keys[0]
                continue
            self.dequantised |= set(keys if quantizer is not None else ())
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
class Header:
    """What a file says of a tensor in it. ``kind`` is its dtype's name, torch's where it has one.

    ``dtype`` stands in for those that torch does not compute with, which no model gets.
    """

    kind: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def headers_of(path: Path) -> dict[str, Header]:
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
        result[key] = Header(kind, dtype or torch.uint8, torch.Size(value["shape"]), offset)
    return result


def _pickled_headers(path: Path) -> dict[str, Header]:
    """Of each tensor in a pickle, without its data."""
    return {
        key: Header(str(value.dtype).removeprefix("torch."), value.dtype, value.shape, 0)
        for key, value in torch.load(path, map_location="meta", weights_only=True).items()
        if isinstance(value, Tensor)
    }


# Frequencies, positions and causal masks (GPT-2's), which models compute now.
_ONCE_SAVED = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"\.(attn|attention)\.(masked_)?bias$",
)


def missing_weight(folder: Path, names: list[str]) -> ValueError:
    """For weights of the model that the files do not have."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ValueError(
        f"{folder} has no weight for {names[0]}{more}; expected one in its files for every weight "
        "of the model that config.json describes"
    )


def warn_of_unused(folder: Path, model: Any, names: Iterable[str]) -> None:
    """A warning of weights in the files that the model has no use for, if there are any.

    ``names`` as the model would have them. Not of those that transformers knows to be left over:
    what the class declares, and buffers that old versions saved (:data:`_ONCE_SAVED`).
    """
    known = {*_ONCE_SAVED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())}
    unused = sorted(
        (name for name in names if not any(re.search(pattern, name) for pattern in known)),
        key=natural,
    )
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.warn(
            f"{folder} has weights that the model of its config.json does not use, {unused[0]}"
            f"{more}; expected a config.json that fits them (num_hidden_layers, say): they are "
            "left out",
            stacklevel=2,
        )


def natural(key: str) -> list[tuple[int, str]]:
    """Sort key in which experts.2 comes before experts.10."""
    return [(int(part) if part.isdigit() else -1, part) for part in key.split(".")]


def check_shapes(folder: Path, shapes: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    """ValueError for the first weight whose shapes differ: (name, in the files, in the model)."""
    for name, there, here in shapes:
        if tuple(there) != tuple(here):
            raise ValueError(
                f"{name} has shape {tuple(there)} in {folder}; expected {tuple(here)}, as "
                "config.json describes it"
            )


@contextlib.contextmanager
def understood(folder: Path) -> Iterator[None]:
    """What transformers trips over in a folder's files (a KeyError, say), as a ValueError.

    What names its cause itself, ValueError, OSError and ImportError, stays what it is, and so does
    a shortage of memory.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be loaded as a model: {type(error).__name__}: {error}"
        ) from error
