"""The images of a row: where they are, how they are opened, and where in the turns they stand."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filet.data.samples import Chat
from filet.data.sources import Source

__all__ = ["Pictures", "count_of"]

_COLUMNS = ("images", "image")
_OTHERS = ("videos", "video", "audios", "audio")  # that nobody reads here

# In a part of a turn: what may have the image itself.
_GIVEN = ("image", "image_url", "url", "path", "base64")

_PLACE = "<image>"  # in a text, as LLaVA's and LLaMA-Factory's files have it


class Pictures:
    """Opens the images of a data set's rows, and puts them where the turns have their places.

    Args:
        source: the data set; paths in its rows are relative to its file, or its folder.
    """

    def __init__(self, source: Source) -> None:
        path = Path(source.path)
        self._folder = path if path.is_dir() else path.parent

    def of_row(self, where: str, row: Mapping[str, Any]) -> list[Any]:
        """What the columns ``images`` or ``image`` have, opened.

        Raises ValueError, naming the row, for what is no image, and for videos and sounds.
        """
        other = next((name for name in _OTHERS if row.get(name)), None)
        if other is not None:
            raise ValueError(f"{where}: {other!r} is not read; expected images and text alone")
        found: Any = next((row[name] for name in _COLUMNS if row.get(name) is not None), [])
        given = found if isinstance(found, (list, tuple)) else [found]
        return [self._opened(where, each) for each in given]

    def placed(self, chat: Chat, images: Sequence[Any]) -> Chat:
        """A conversation whose turns are lists of parts, each image in its part.

        A part has its image, or takes the next of ``images``. Without such a part the texts may
        have ``<image>`` for each of them; else all stand before the first text of the user, as TRL
        puts them.
        """
        turns = [dict(turn) for turn in chat.messages]
        texts = [turn.get("content") for turn in turns]
        marked = sum(text.count(_PLACE) for text in texts if isinstance(text, str))
        places = any(_is_image(part) for text in texts if isinstance(text, list) for part in text)
        splits = bool(images) and not places and marked == len(images)
        first = None
        if images and not places and not splits:
            first = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
        free = list(images)
        for number, turn in enumerate(turns):
            content = turn.get("content")
            if isinstance(content, str):
                before = [{"type": "image"}] * (len(images) if number == first else 0)
                content = [*before, *(_split(content) if splits else [_text(content)])]
            if isinstance(content, list):
                turn["content"] = [self._part(chat.where, part, free) for part in content]
        if free:
            raise ValueError(
                f"{chat.where}: {len(images)} images, and {len(images) - len(free)} places for "
                "them in the turns; expected as many parts of type 'image'"
            )
        return dataclasses.replace(chat, messages=turns)

    def _part(self, where: str, part: Mapping[str, Any], free: list[Any]) -> dict[str, Any]:
        if part["type"] == "text" and isinstance(part.get("text"), str):
            return _text(part["text"])
        if not _is_image(part):
            raise ValueError(
                f"{where}: a turn has a part of type {part['type']!r}; expected 'text' or 'image'"
            )
        key = next((key for key in _GIVEN if part.get(key) is not None), None)
        if key is not None:
            given = f"data:,{part[key]}" if key == "base64" else part[key]
            return {"type": "image", "image": self._opened(where, given)}
        if not free:
            raise ValueError(f"{where}: a turn has an image that is not there; expected it in the "
                             "part, or in the column 'images'")  # fmt: skip
        return {"type": "image", "image": free.pop(0)}

    def _opened(self, where: str, value: Any) -> Any:
        """An image in RGB, turned as its file says."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        if isinstance(value, Mapping):  # as datasets has them undecoded, or OpenAI's addresses
            value = next((value[k] for k in ("bytes", "path", "url") if value.get(k)), None)
        if hasattr(value, "convert"):
            return value.convert("RGB")
        try:
            if isinstance(value, bytes):
                opened: Any = io.BytesIO(value)
            elif isinstance(value, str):
                opened = self._file(where, value)
            else:
                kind = type(value).__name__
                raise ValueError(f"{where}: the image is a {kind}; expected an image, or its path")
            with Image.open(opened) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, OSError, binascii.Error) as error:
            said = str(value)[:80] if isinstance(value, str) else "of bytes"
            raise ValueError(f"{where}: image {said!r} cannot be opened: {error}") from error

    def _file(self, where: str, value: str) -> Any:
        if value.startswith("data:"):
            return io.BytesIO(base64.b64decode(value.partition(",")[2]))
        if re.match(r"https?:", value):
            raise ValueError(f"{where}: image {value!r} is an address; expected a file here")
        path = self._folder / value.removeprefix("file://")
        if not path.is_file():
            raise ValueError(f"{where}: no image at {path}; expected a path from {self._folder}")
        return path


def count_of(turns: Sequence[Mapping[str, Any]]) -> int:
    """How many images some turns have."""
    contents = (turn.get("content") for turn in turns)
    return sum(_is_image(part) for each in contents if isinstance(each, list) for part in each)


def _is_image(part: Mapping[str, Any]) -> bool:
    return part["type"] in ("image", "image_url")


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _split(content: str) -> list[dict[str, Any]]:
    """The parts of a text with places for images in it."""
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(content.split(_PLACE)):
        parts += [{"type": "image"}] if number else []
        parts += [_text(text)] if text else []
    return parts
