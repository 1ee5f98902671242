"""FiletReport: the table, the picture and the file."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from disk import files_up_to
from filet.report.modules import ModuleReport
from filet.report.names import REPORT_FILE
from filet.report.plot import log10_energies, log_range, panels_of, ticks_of
from filet.report.report import FiletReport
from filet.report.table import HEADER, count

KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}
CHOSEN_COLOUR = (0xE8, 0x59, 0x0C)


def make_module(name: str, shape: tuple[int, int] = (8, 6), rank: int = 2, **changes: Any):
    generator = torch.Generator().manual_seed(len(name))
    energies = 10 ** (torch.randn(shape[1], generator=generator, dtype=torch.float64) - 6)
    values: dict[str, Any] = {
        "name": name,
        "shape": shape,
        "rank": rank,
        "energies": energies,
        "indices": energies.argsort()[:rank],
        "input_space": "x",
        "output_space": "h",
        "input_tokens": 1234,
        "output_tokens": 1234,
        "shared_input": None,
    }
    return ModuleReport(**(values | changes))


def make_report(modules: list[ModuleReport], **changes: Any) -> FiletReport:
    values: dict[str, Any] = {
        "modules": {module.name: module for module in modules},
        "left_default": {},
        "seconds": {"statistics": 65.2, "energies": 3.1},
        "peak_memory": 3 * 2**30,
        "samples": 320,
        "tokens": 81234,
        "loss_terms": 80914,
        "config": {"select": "min", "scaling": "fisher"},
    }
    return FiletReport(**(values | changes))


@pytest.fixture
def big() -> FiletReport:
    return make_report(
        [
            make_module(f"model.layers.{layer}.{kind}", shape, rank=8)
            for layer in range(30)
            for kind, shape in KINDS.items()
        ]
    )


def image_of(path: Path) -> torch.Tensor:
    """(height, width, 3) uint8."""
    from matplotlib.image import imread

    return (torch.from_numpy(imread(path))[..., :3] * 255).round().to(torch.uint8)


def pixels_of(path: Path, colour: tuple[int, int, int]) -> int:
    distance = (image_of(path).int() - torch.tensor(colour)).abs().amax(-1)
    return int((distance < 40).sum())


# -- table -----------------------------------------------------------------------------------------


def test_table_has_a_row_a_module_in_the_models_order(big: FiletReport) -> None:
    lines = big.table().splitlines()
    rows = lines[2 : 2 + len(big.modules)]
    for name, row in zip(big.modules, rows, strict=True):
        assert name.removeprefix("model.layers.").split(".", 1)[1] in row
        assert f"{big.modules[name].shape[0]} x {big.modules[name].shape[1]}" in row
    assert [row.split()[0].removeprefix("model.layers.").split(".")[0] for row in rows] == [
        str(layer) for layer in range(30) for _ in KINDS
    ]


def test_table_is_ascii_and_at_most_100_wide(big: FiletReport) -> None:
    long_name = "encoder.block.{}.layer.1.DenseReluDense.with_a_very_long_name.wi_{}"
    names = [long_name.format(layer, part) for layer in range(12) for part in (0, 1)]
    wide = make_report(
        [make_module(name, output_tokens=1_200_000, input_tokens=99_999) for name in names]
        + [make_module("head")]
    )
    for report in (big, wide):
        table = report.table()
        assert table.isascii()
        assert max(len(line) for line in table.splitlines()) <= 100


def test_shortened_names_stay_apart() -> None:
    names = [f"a_long_prefix.of.the.model.block.{n}.attention.projection" for n in range(20)]
    names.append("head")  # no common prefix to drop
    rows = make_report([make_module(name) for name in names]).table().splitlines()[2:23]
    first = [row.split()[0] for row in rows]
    assert len(set(first)) == 21
    assert first[7].startswith("...") and first[7].endswith(".7.attention.projection")


def test_table_says_energies_and_tokens() -> None:
    energies = torch.tensor([4e-3, 2e-9, 1e-4, float("nan"), 0.0, 3e-8], dtype=torch.float64)
    module = make_module(
        "fc",
        energies=energies,
        indices=torch.tensor([1, 5]),
        input_tokens=500,
        output_tokens=480,
        shared_input="other",
    )
    row = make_report([module]).table().splitlines()[2].split()
    # shape, rank, moments (the input's shared), chosen from, to, median of the candidates, ...
    assert row == "fc 8 x 6 2 x* h 2.0e-9 3.0e-8 3.0e-8 500/480".split()
    table = make_report([module]).table()
    assert "1 zero column of W in 1 module" in table
    assert "320 samples, 81,234 tokens, 80,914 loss terms" in table
    assert "28 LoRA parameters" in table
    assert "statistics 1 min 05 s" in table and "peak memory   3 GiB" in table


def test_the_columns_are_explained() -> None:
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
    rows = page.partition("**The table**")[2].partition("| --- | --- |")[2].partition("\n\n")[0]
    explained = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows.strip().splitlines()]
    assert [name for names in explained for name in names] == list(HEADER)


def test_table_groups_what_kept_the_default() -> None:
    left = {f"experts.{n}": "saw no token" for n in range(6)} | {"head": "is an embedding"}
    table = make_report([make_module("fc")], left_default=left).table()
    assert "6 modules: experts.0, experts.1, experts.2, experts.3 and 2 more: saw no token" in table
    assert "1 module: head: is an embedding" in table


def test_table_of_nothing() -> None:
    report = make_report([], left_default={"fc": "saw no token"}, seconds={}, peak_memory=0)
    assert "no module" in report.table()
    assert "fc: saw no token" in report.table()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (99_999, "99,999"),
        (100_000, "100k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (81_234_567, "81.2M"),
        (2_500_000_000, "2.5G"),
    ],
)
def test_count_of_tokens(number: int, text: str) -> None:
    assert count(number) == text


# -- picture ---------------------------------------------------------------------------------------


def test_plot_marks_the_chosen(tmp_path: Path, big: FiletReport) -> None:
    chosen, none = tmp_path / "chosen.png", tmp_path / "none.png"
    big.plot(chosen)
    without = [
        make_module(name, module.shape, rank=0, energies=module.energies)
        for name, module in big.modules.items()
    ]
    make_report(without).plot(none)
    # The legend has the colour in both.
    assert pixels_of(chosen, CHOSEN_COLOUR) > pixels_of(none, CHOSEN_COLOUR) + 5000


def test_plot_is_a_png_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    make_report([make_module("fc")]).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture"]


@pytest.mark.parametrize(
    "energies",
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 1e-300, 1e300, float("nan")],
        [1e-5, 1e-5, 1e-5, 1e-5],
        [float("nan")] * 4,
        [5e-324, 0.0, 1.0, 2.0],
    ],
)
def test_plot_of_degenerate_energies(tmp_path: Path, energies: list[float]) -> None:
    values = torch.tensor(energies, dtype=torch.float64)
    rank = int((~values.isnan()).sum().clamp(max=2))
    module = make_module(
        "blocks.0.fc", (3, 4), rank, energies=values, indices=torch.arange(4)[:rank]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_report([module]).plot(tmp_path / "p.png")
        assert "blocks.0.fc" in make_report([module]).table()
    assert image_of(tmp_path / "p.png").shape[2] == 3


def test_zero_energies_lie_below_all_others() -> None:
    module = make_module(
        "fc", (3, 3), 1, energies=torch.tensor([0.0, 1e-9, 1e-3], dtype=torch.float64)
    )
    axis = log_range([module])
    assert axis.has_zero
    assert axis.bottom < axis.floor < -9.0 < -3.0 < axis.top
    values = log10_energies(module.energies, axis.floor)
    assert values.tolist() == pytest.approx([axis.floor, -9.0, -3.0])


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        ([1e-9, 1e-3], ["$10^{-8}$", "$10^{-6}$", "$10^{-4}$"]),
        ([0.0, 1e-9, 1e-3], ["0", "$10^{-8}$", "$10^{-6}$", "$10^{-4}$"]),
        ([0.4, 50.0], ["$10^{0}$", "$10^{1}$"]),
        ([1.2, 2.9], ["2", "3"]),  # eigenvalues of a task against what is kept
        ([1.2, 6.0], ["2", "5"]),
        ([1.4e-7, 8e-7], ["$2\\cdot 10^{-7}$", "$5\\cdot 10^{-7}$"]),
        ([1.23, 1.23], ["1.2", "1.3"]),
        ([1230.0, 1230.0], ["1200", "1300"]),
    ],
)
def test_the_axis_has_two_numbers_at_least(energies: list[float], expected: list[str]) -> None:
    values = torch.tensor(energies, dtype=torch.float64)
    axis = log_range([make_module("fc", (3, len(energies)), 1, energies=values)])
    places, labels = ticks_of(axis)
    assert labels == expected
    for place, label in zip(places, labels, strict=True):
        assert axis.bottom <= place <= axis.top
        power = label.strip("$").replace("\\cdot 10^{", "e").replace("10^{", "1e").strip("}")
        value = float(power)
        assert place == pytest.approx(math.log10(value) if value else axis.floor)


def test_panels_group_by_kind() -> None:
    names = [f"h.{n}.{kind}.c_proj" for n in range(3) for kind in ("attn", "mlp")]
    names += [f"h.{n}.moe.experts.{e}.up" for n in range(2) for e in range(4)]
    names += ["score", "classifier"]
    panels = panels_of([make_module(name) for name in names])
    assert [panel.title for panel in panels] == [
        "attn.c_proj",
        "mlp.c_proj",
        "up",
        "outside the layers",
    ]
    assert panels[0].positions == [0, 1, 2]
    assert [len(column) for column in panels[2].columns] == [4, 4]
    assert panels[3].names == ["score", "classifier"]


def test_plot_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        make_report([]).plot(tmp_path / "p.png")


def test_plot_leaves_the_global_backend_alone(tmp_path: Path) -> None:
    code = """
import sys, torch
from filet.report.report import FiletReport
FiletReport.load(sys.argv[1]).plot(sys.argv[1] + "/p.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    make_report([make_module("fc")]).save(tmp_path)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "p.png").is_file()


# -- file ------------------------------------------------------------------------------------------


def test_save_and_load_bring_everything_back(tmp_path: Path) -> None:
    first = make_module("layers.0.fc", shared_input="layers.0.other")
    first.energies[3] = float("nan")
    first.energies[4] = 0.0
    second = make_module("layers.10.fc")
    third = make_module("layers.2.fc", rank=0)
    report = make_report(
        [first, second, third], left_default={"head": "why"}, config={"seed": 3}, data=2**90 + 5
    )
    path = report.save(tmp_path)
    assert path == tmp_path / REPORT_FILE
    for source in (tmp_path, path, str(path)):
        loaded = FiletReport.load(source)
        assert list(loaded.modules) == ["layers.0.fc", "layers.10.fc", "layers.2.fc"]
        for name, module in report.modules.items():
            other = loaded.modules[name]
            assert torch.equal(other.energies.view(torch.int64), module.energies.view(torch.int64))
            assert other.energies.dtype == torch.float64
            assert torch.equal(other.indices, module.indices)
            assert other.indices.dtype == torch.int64
            assert isinstance(other.shape, tuple)
            for field in ("name", "shape", "rank", "input_space", "output_space", "shared_input"):
                assert getattr(other, field) == getattr(module, field)
            assert other.input_tokens == module.input_tokens
            assert other.output_tokens == module.output_tokens
        for field in ("left_default", "seconds", "peak_memory", "samples", "tokens", "loss_terms"):
            assert getattr(loaded, field) == getattr(report, field)
        assert loaded.data == report.data
        assert loaded.config == {"seed": 3}
        assert loaded.table() == report.table()


def test_save_accepts_energies_that_share_storage(tmp_path: Path) -> None:
    pool = torch.rand(12, dtype=torch.float64)
    modules = [
        make_module("a", energies=pool[:6]),
        make_module("b", energies=pool[6:]),
        make_module("c", energies=pool[::2]),
    ]
    make_report(modules).save(tmp_path)
    assert torch.equal(FiletReport.load(tmp_path).modules["c"].energies, pool[::2])


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    old = make_report([make_module("old")])
    old.save(tmp_path)
    with files_up_to(500):
        with pytest.raises(OSError, match="File too large"):
            make_report([make_module("new")]).save(tmp_path)
        with pytest.raises(OSError, match="File too large"):
            make_report([make_module("new")]).plot(tmp_path / "p.png")
    assert [entry.name for entry in tmp_path.iterdir()] == [REPORT_FILE]
    assert list(FiletReport.load(tmp_path).modules) == ["old"]


def test_saved_file_has_ordinary_permissions(tmp_path: Path) -> None:
    path = make_report([make_module("fc")]).save(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_load_refuses_what_is_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no filet report at"):
        FiletReport.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no filet report at"):
        FiletReport.load(tmp_path / "nowhere")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"garbage.safetensors is not a readable filet report"):
        FiletReport.load(garbage)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is not a filet report"):
        FiletReport.load(other)
    for version in ("1", "9"):
        metadata = {"format": "filet_report", "version": version}
        save_file({"w": torch.zeros(2)}, other, metadata=metadata)
        with pytest.raises(ValueError, match=f"of version '{version}'; this package reads .*'2'"):
            FiletReport.load(other)
    save_file({"w": torch.zeros(2)}, other, metadata={"format": "filet_report", "version": "2"})
    with pytest.raises(ValueError, match="not a readable filet report"):
        FiletReport.load(other)


def test_load_refuses_a_truncated_report(tmp_path: Path) -> None:
    path = make_report([make_module("fc")]).save(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable filet report"):
        FiletReport.load(path)
