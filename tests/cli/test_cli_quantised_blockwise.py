"""``filet init --quantize`` by the blockwise engine: the other one's adapter, for the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_cases import adapter_weights, arguments

from filet import FiletReport
from filet.cli.main import main

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "how",
    [["--quantize", "nf4"], ["--quantize", "fp4", "--double-quant"], ["--quantize", "int8"]],
    ids=" ".join,
)
def test_both_engines_quantise(how: list[str], init: list[str], tmp_path: Path) -> None:
    for engine in ("memory", "blockwise"):
        output = arguments("--output", tmp_path / engine, "--engine", engine)
        assert main([*init, *how, *output]) == 0
    assert main([*init, *arguments("--output", tmp_path / "plain", "--engine", "blockwise")]) == 0
    mine, theirs = (adapter_weights(tmp_path / engine) for engine in ("blockwise", "memory"))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
    reports = {name: FiletReport.load(tmp_path / name) for name in ("memory", "blockwise", "plain")}
    for name, module in reports["blockwise"].modules.items():
        other = reports["memory"].modules[name]
        torch.testing.assert_close(module.energies, other.energies, rtol=1e-5, atol=0)
        assert torch.equal(module.indices, other.indices)
        plain = reports["plain"].modules[name].energies
        assert not torch.allclose(module.energies, plain, rtol=1e-4, atol=0)
