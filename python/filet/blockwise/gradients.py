"""The files of gradients in a run's folder: each process writes those of its own samples.

A file says whose gradients it has, so that they are found again by processes that have the samples
in other batches, or of which there are more, or fewer.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from filet.blockwise.arenas import Arena, Gradient, Layout
from filet.blockwise.disk import Disk
from filet.model.sample import Sample

__all__ = ["Gradients"]

# The end of a file: what the gradient is multiplied by, its largest number where that matters, and
# how many bytes before these say what it is of.
_END = struct.Struct("<ddQ")

_NAME = re.compile(r"gradient-(\d+)(?:\.(\d+)-of-(\d+))?\.raw")


class Gradients:
    """The gradients with respect to outputs of blocks, in files of a folder.

    Attributes:
        nbytes: of a file of this process's, once :meth:`describe` has said of what it is.
    """

    def __init__(self, folder: Path, disk: Disk, rank: int = 0, size: int = 1) -> None:
        self.nbytes = 0
        self._folder = folder
        self._disk = disk
        self._rank = rank
        self._size = size
        self._values = 0  # bytes of them, of which a file has the gradients of this process
        self._about = b""

    def describe(self, layout: Layout, batches: Sequence[Sequence[Sample]]) -> None:
        """What a file of this process's has: the gradients of these samples, as in the layout."""
        shapes = layout.shapes[: len(batches)]
        samples = [[[each.digest, each.start, each.tokens] for each in its] for its in batches]
        self._about = json.dumps([shapes, samples]).encode()
        self._values = layout.of_gradients
        self.nbytes = self._values + len(self._about) + _END.size

    def complete(self) -> set[int]:
        """The blocks of whose outputs all gradients are there."""
        return {block for block in self.blocks() if self._parts(block)}

    def blocks(self) -> set[int]:
        """Those of whose outputs some are."""
        return {block for block, *_ in self._files()}

    def path(self, block: int) -> Path:
        """The file of this process."""
        part = "" if self._size == 1 else f".{self._rank}-of-{self._size}"
        return self._folder / f"gradient-{block}{part}.raw"

    def save(self, beside: Path, gradient: Gradient, abandon: threading.Event) -> None:
        """Write a gradient to the file ``beside``, unless that is abandoned."""
        trailer = self._about + _END.pack(gradient.scale, gradient.peak, len(self._about))
        gradient.arena.save(self._disk, beside, trailer, abandon, nbytes=self._values)

    def load(self, block: int, arena: Arena, layout: Layout) -> Gradient:
        """What :meth:`save` wrote of a block, in whatever batches and by whatever processes."""
        mine, paths = self.path(block), self._parts(block)
        if mine in paths and self._end(mine)[2] == self._about:
            trailer = arena.load(self._disk, mine, self.nbytes - self._values, nbytes=self._values)
            scale, peak, _ = _END.unpack(trailer[-_END.size :])
            return Gradient(arena, scale, peak)
        scale = peak = 0.0
        arena.clear()
        wanted: dict[str, list[torch.Tensor]] = {}
        for view, samples in zip(arena.views, json.loads(self._about)[1], strict=False):
            for row, (digest, start, tokens) in zip(view, samples, strict=True):
                wanted.setdefault(digest, []).append(row[start : start + tokens])
        for path in paths:
            scale, peak, about = self._end(path)
            self._pick(path, about, layout, wanted)
        if wanted:
            raise ValueError(
                f"{mine.parent} has no gradient of {len(wanted)} samples of block {block}; "
                "expected those of all samples, or the folder removed to begin anew"
            )
        return Gradient(arena, scale, peak)

    def unlink(self, these: Callable[[int], bool] = lambda block: True) -> None:
        """Remove the files of these blocks, by default of all.

        While a sweep goes on, of higher ones than its own alone, to which it came before: those
        below are of other processes that are faster.
        """
        for block, _, _, path in self._files():
            if these(block):
                path.unlink(missing_ok=True)

    def _pick(
        self, path: Path, about: bytes, layout: Layout, wanted: dict[str, list[torch.Tensor]]
    ) -> None:
        """Read the wanted samples that a file has; they are wanted no longer."""
        shapes, batches = json.loads(about)
        there = Layout([torch.Size(shape) for shape in shapes], layout.dtype)
        for shape, offset, samples in zip(shapes, there.offsets, batches, strict=True):
            _, length, width = shape
            for index, (digest, start, tokens) in enumerate(samples):
                at = offset + (index * length + start) * width * layout.dtype.itemsize
                for row in wanted.pop(digest, []):
                    assert len(row) == tokens
                    goal: Any = row.view(-1).view(torch.uint8).numpy()
                    self._disk.part(path, memoryview(goal), at)

    def _end(self, path: Path) -> tuple[float, float, bytes]:
        """Scale, peak and what a file says that it has."""
        size = path.stat().st_size
        end = bytearray(_END.size)
        self._disk.part(path, memoryview(end), size - len(end))
        scale, peak, length = _END.unpack(end)
        about = bytearray(length)
        self._disk.part(path, memoryview(about), size - len(end) - length)
        return scale, peak, bytes(about)

    def _parts(self, block: int) -> list[Path]:
        """The files that have all gradients of a block between them; none where one lacks."""
        sets: dict[int, list[Path]] = {}
        for its, _, size, path in self._files():
            if its == block:
                sets.setdefault(size, []).append(path)
        return next((paths for size, paths in sets.items() if len(paths) == size), [])

    def _files(self) -> Iterator[tuple[int, int, int, Path]]:
        """Block, rank and number of processes of each file, and its path."""
        for path in sorted(self._folder.glob("gradient-*.raw")):
            if (found := _NAME.fullmatch(path.name)) is not None:
                yield int(found[1]), int(found[2] or 0), int(found[3] or 1), path
