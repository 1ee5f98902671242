"""What the tests of the blockwise engine get: a model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockwise_runs import model_folder


@pytest.fixture
def folder() -> Path:
    return model_folder("llama")
