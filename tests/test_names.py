"""Where a module lies, told by its path."""

from __future__ import annotations

import pytest

from filet.system.names import Place, split


@pytest.mark.parametrize(
    ("name", "path", "place", "block"),
    [
        (
            "model.layers.3.mlp.up_proj",
            None,
            Place(("model", "layers"), 3, ("mlp", "up_proj")),
            "model.layers.3",
        ),
        ("0", None, Place((), 0, ()), "0"),
        ("lm_head", None, Place((), None, ("lm_head",)), ""),
        ("h.1.experts.12.w1", None, Place(("h",), 1, ("experts", "12", "w1")), "h.1"),
        ("towers.1.h.2.w", "towers.1.h", Place(("towers", "1", "h"), 2, ("w",)), "towers.1.h.2"),
        ("model.layers2.0.w", "model.layers", Place((), None, ("model", "layers2", "0", "w")), ""),
    ],
)
def test_split(name: str, path: str | None, place: Place, block: str) -> None:
    assert split(name, path) == place
    assert place.block == block
