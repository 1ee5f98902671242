"""safetensors files that are written one tensor at a time, read back by the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from disk import files_up_to
from filet.system.tensorfile import DTYPES, write_tensors

METADATA = {"format": "test", "text": '"quoted", ünï ∑\n'}


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits at all, NaN of every kind among them."""
    generator = torch.Generator().manual_seed(len(shape))
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def header_of(path: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % 8 == 0 and content[8:9] == b"{"
    header = json.loads(content[8:end])
    header.pop("__metadata__")
    return header, content[end:]


@pytest.mark.parametrize("names", [list(DTYPES), ["F32"], ["F64", "F32", "I64"]])
def test_the_same_as_the_librarys(names: list[str], tmp_path: Path, device: torch.device) -> None:
    tensors = {}
    for name in names:
        dtype = DTYPES[name]
        tensors |= {
            f"{name}.matrix": some(dtype, 5, 7),
            f"{name}.odd": some(dtype, 3),
            f"{name}.scalar": some(dtype),
            f"{name}.empty": some(dtype, 0, 4),
            f"{name} ∑ ü": some(dtype, 2, 1, 3),
        }
    ours, theirs = tmp_path / "new folder" / "ours", tmp_path / "theirs"
    write_tensors(ours, {key: value.to(device) for key, value in tensors.items()}, METADATA)
    save_file(tensors, theirs, METADATA)
    for loaded in (load_file(ours), load_file(theirs)):
        assert loaded.keys() == tensors.keys()
        for key, value in tensors.items():
            assert loaded[key].dtype == value.dtype and loaded[key].shape == value.shape
            assert torch.equal(bits(loaded[key]), bits(value)), key
    with safe_open(ours, framework="pt") as file:
        assert file.metadata() == METADATA
    # One after the other from the first byte to the last, each aligned to its dtype.
    header, data = header_of(ours)
    places = [entry["data_offsets"] for entry in header.values()]
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert places[-1][1] == len(data) == len(header_of(theirs)[1])
    for key, entry in header.items():
        assert entry["data_offsets"][0] % tensors[key].itemsize == 0


def test_strides_and_what_is_changed_on_the_way(tmp_path: Path, device: torch.device) -> None:
    x = torch.arange(24.0, device=device).view(4, 6)
    tensors = {"transposed": x.T, "part": x[1:3, ::2], "all": x, "one": x[0, 3]}
    before = x.clone()
    write_tensors(tmp_path / "file", tensors, {}, lambda copy: copy.neg_())
    assert torch.equal(x, before)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(loaded[key], -value.cpu())


def test_no_tensor_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, METADATA)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == METADATA and list(file.keys()) == []


def test_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"a": torch.zeros(2000), "b": torch.zeros(2000, dtype=torch.int64)}
    for size in (3, 1000, 18_000):  # in the length, in a tensor, in the other one
        with files_up_to(size), pytest.raises(OSError, match="File too large"):
            write_tensors(path, tensors, {})
        assert list(tmp_path.iterdir()) == []
    write_tensors(path, tensors, {})
    content = path.read_bytes()
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        write_tensors(path, tensors, {"more": "text"})
    with pytest.raises(TypeError, match=r"b is torch\.complex64; expected one of torch\.float64, "):
        write_tensors(path, tensors | {"b": torch.zeros(2, dtype=torch.complex64)}, {})
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == content, "the file that was there before is still whole"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
