"""The blockwise engine on quantised models, against the one that holds the whole quantised model.

On a CPU both run the very same operations on the same packed bytes, so the energies are equal to
the bit here; the tolerances below are what is asked of them anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    MARKS,
    Failing,
    adapter,
    assert_equal,
    assert_same_adapter,
    batches,
    in_step,
    initialize,
    kept,
    lora,
)
from peft import LoraConfig, PeftModel
from quantised_folders import PACKED, fp8, loaded, packed, packing, whole

import filet
from filet import FiletConfig, FiletReport, Statistics
from filet.blockwise.machine import Machine
from filet.model.targets import adapted

pytestmark = MARKS


def in_memory(
    folder: Path,
    output: Path,
    quantize: str | None = None,
    config: FiletConfig | None = None,
    device: torch.device | str = "cpu",
    **more: Any,
) -> FiletReport:
    """What the engine that holds the model makes of the one that transformers loads."""
    model = loaded(folder, quantize, device=device)
    config = config or FiletConfig()
    peft_model = adapted(model, lora(), config.seed)
    report = filet.initialize_lora_filet_weights(
        peft_model, batches(), config, show_progress_bar=False, **more
    )
    filet.save_as_lora(peft_model, output)
    return report


def blockwise(
    folder: Path, output: Path, quantize: str | None = None, machine: Any = None, **more: Any
) -> FiletReport:
    given = {} if quantize is None else {"quantization_config": packing(quantize)}
    return initialize(folder, output, machine=machine or Machine(), **given, **more)


def both(kind: str, quantised: bool, dtype: torch.dtype = torch.float32) -> tuple[Path, str | None]:
    """The two ways to the same base: packed in its folder, or quantised on the way."""
    return (whole(dtype=dtype), kind) if quantised else (packed(kind, dtype=dtype), None)


@pytest.mark.parametrize("quantised", [False, True], ids=["packed", "quantised"])
@pytest.mark.parametrize("kind", PACKED)
def test_equals_the_engine_in_memory(
    kind: str, quantised: bool, tmp_path: Path, device: torch.device
) -> None:
    folder, quantize = both(kind, quantised)
    mine = blockwise(folder, tmp_path / "blockwise", quantize, device=device)
    theirs = in_memory(folder, tmp_path / "memory", quantize, device=device)
    assert_equal(mine, theirs, 1e-5)
    assert len(mine.modules) == 35 and not mine.left_default
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


def test_by_name_of_the_engine(tmp_path: Path) -> None:
    """As one calls it: quantised by both engines, and packed in the folder."""
    reports = [
        initialize(whole(), tmp_path / engine, engine, quantization_config=packing("double"))
        for engine in ("memory", "blockwise")
    ]
    reports.append(initialize(packed("double"), tmp_path / "packed", "blockwise"))
    assert_equal(reports[1], reports[0], 1e-5)
    assert_equal(reports[2], reports[0], 1e-5)
    with pytest.raises(ValueError, match="expected no quantization_config"):
        initialize(packed("nf4"), tmp_path / "out", quantization_config=packing("nf4"))


@pytest.mark.parametrize("kind", ["double", "int8"])
def test_half_precision(kind: str, tmp_path: Path) -> None:
    folder, quantize = both(kind, True, torch.bfloat16)
    mine = blockwise(folder, tmp_path / "blockwise", quantize)
    assert_equal(mine, in_memory(folder, tmp_path / "memory", quantize), 1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"fisher": "sampled"}, {"start": "untouched"}, {"select": "max", "scaling": "singular"}],
    ids=str,
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    config = FiletConfig(**settings)
    mine = blockwise(packed("nf4"), tmp_path / "blockwise", config=config)
    assert_equal(mine, in_memory(packed("nf4"), tmp_path / "memory", config=config), 1e-5)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


def test_data_to_keep(tmp_path: Path) -> None:
    mine = blockwise(whole(), tmp_path / "blockwise", "nf4", keep=kept())
    theirs = in_memory(whole(), tmp_path / "memory", "nf4", keep=kept())
    assert_equal(mine, theirs, 1e-5)


def test_the_base_is_not_the_whole_one(tmp_path: Path) -> None:
    """Quantising moves the energies by what it moves the weights, and more than rounding does."""
    # As wide as a block: bitsandbytes takes wrong scales for some others on CPUs with AVX512.
    plain = initialize(whole("wide"), tmp_path / "plain")
    for kind in PACKED:
        report = blockwise(whole("wide"), tmp_path / kind, kind)
        name = "model.layers.1.mlp.up_proj"
        one, other = report.modules[name].energies, plain.modules[name].energies
        difference = float((one - other).norm() / other.norm())
        assert (1e-4 if kind == "int8" else 1e-2) < difference < 0.5, kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the codes stay codes")
def test_fp8_without_a_gpu(tmp_path: Path) -> None:
    """The base is what transformers makes of it then: numbers."""
    folder = fp8(tmp_path / "fp8")
    mine = blockwise(folder, tmp_path / "blockwise")
    assert_equal(mine, in_memory(folder, tmp_path / "memory"), 1e-3)


# What belongs to the base.


def test_statistics_are_exchanged_between_the_engines(tmp_path: Path) -> None:
    """Of the same packed base, however it came to it; and of no other."""
    path = tmp_path / "statistics.safetensors"
    mine = blockwise(packed("double"), tmp_path / "blockwise", save_statistics=path)
    statistics = Statistics.load(path)
    for folder, quantize in ((packed("double"), None), (whole(), "double")):
        peft_model = adapted(loaded(folder, quantize), lora(), 0)
        report = filet.apply_statistics(peft_model, statistics)
        assert_equal(report, mine, 1e-5)
    for folder, quantize in ((packed("nf4"), None), (whole(), None)):
        peft_model = adapted(loaded(folder, quantize), lora(), 0)
        with pytest.raises(ValueError, match="belong"):
            filet.apply_statistics(peft_model, statistics)


def test_the_adapter_is_for_the_base_that_is_trained(tmp_path: Path) -> None:
    """Plain PEFT and filet.load put it on the base that transformers quantises."""
    blockwise(whole(), tmp_path / "out", "nf4")
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        before = loaded(whole(), "nf4").eval()(ids, use_cache=False).logits
        for load in (PeftModel.from_pretrained, filet.load):
            model = load(loaded(whole(), "nf4"), tmp_path / "out").eval()
            assert torch.equal(model(ids, use_cache=False).logits, before)


# Resumed.


@pytest.mark.parametrize("quantised", [False, True], ids=["packed", "quantised"])
def test_goes_on_after_an_error(quantised: bool, tmp_path: Path) -> None:
    folder, quantize = both("double", quantised)
    blockwise(folder, tmp_path / "whole", quantize)
    failing = in_step(disk=Failing(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        blockwise(folder, tmp_path / "out", quantize, machine=failing)
    assert list((tmp_path / "out.filet-run").glob("block-*"))
    blockwise(folder, tmp_path / "out", quantize)
    mine, theirs = adapter(tmp_path / "out"), adapter(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    ("other", "said"),
    [("fp4", "quantised.*'nf4' there and 'fp4' now"), (None, "quantised is .* and None now")],
)
def test_another_quantisation_does_not_go_on(other: str | None, said: str, tmp_path: Path) -> None:
    failing = in_step(disk=Failing(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        blockwise(whole(), tmp_path / "out", "nf4", machine=failing)
    with pytest.raises(ValueError, match=said):
        blockwise(whole(), tmp_path / "out", other)


@pytest.mark.parametrize("quantised", [False, True], ids=["packed", "quantised"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_whatever_torch_makes_tensors_in(
    quantised: bool, default: torch.dtype, tmp_path: Path
) -> None:
    """The offset of the scales among them, which bitsandbytes reads in the default dtype."""
    folder, quantize = both("double", quantised)
    torch.set_default_dtype(default)
    try:
        mine = blockwise(folder, tmp_path / "blockwise", quantize)
        theirs = in_memory(folder, tmp_path / "memory", quantize)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(mine, theirs, 1e-5)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
@pytest.mark.parametrize("kind", PACKED)
def test_dora_is_refused_by_name(kind: str, engine: Any, tmp_path: Path) -> None:
    """Before PEFT multiplies by weights that are not there."""
    with pytest.raises(ValueError, match="use_dora=True: its adapters are DoraLinearVariant"):
        filet.initialize_folder(
            whole(), batches(), tmp_path / "out",
            LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
            engine=engine, device="cpu", quantization_config=packing(kind),
        )  # fmt: skip
