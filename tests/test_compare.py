"""How alike two adapters are, or two files of statistics; pages that open offline."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import filet
from filet.cli.main import main
from filet.report.compare import Comparison, basis, overlap
from filet.report.heat import heat_map
from models import llama

pytest.importorskip("matplotlib")


def initialised(folder: Path, seed: int, **settings: object) -> filet.Statistics:
    """An adapter's folder and the statistics that it was made of, of data of its own."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(0, 29, (4, 16), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    config = filet.FiletConfig(**settings)  # type: ignore[arg-type]
    statistics = filet.collect_statistics(model, [batch], config, show_progress_bar=False)
    report = filet.apply_statistics(model, statistics, config)
    filet.save_as_lora(model, folder)
    report.save(folder)
    return statistics


def plain(folder: Path, **settings: object) -> None:
    """An adapter that PEFT draws, saved by it into a folder."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings})  # type: ignore
    get_peft_model(llama(), config).save_pretrained(folder)


OTHERS = {
    "rank": ({"r": 6}, "q_proj, where adapter_model.safetensors has a factor A of 6 x 32"),
    "modules": ({"target_modules": ["o_proj"]}, "q_proj, where adapter_model.safetensors has none"),
}


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_report_of_another_adapter_is_refused(
    kind: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        initialised(folder, seed=0, start=start)
    settings, said = OTHERS[kind]
    plain(one, **settings)
    if start == "untouched":
        assert main(["inspect", str(two), str(one)]) == 1
        assert "filet.json describes another adapter than lies" in capsys.readouterr().err
        (one / "filet.json").unlink()
    for argv in ([str(one)], [str(two), str(one)]):
        assert main(["inspect", *argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "is of another adapter than lies beside it" in line and said in line
    assert main(["inspect", str(one / "filet_report.safetensors")]) == 0


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_an_adapter_that_was_saved_again_since_its_report(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on or another of the same ranks: who knows; the same saved again is the same."""
    initialised(tmp_path, seed=0, start=start)
    assert main(["inspect", str(tmp_path)]) == 0
    model = filet.load(llama(), tmp_path)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "warning" not in capsys.readouterr().err
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"the adapter in {tmp_path} was saved again since" in capsys.readouterr().err
    (tmp_path / "filet.json").unlink(missing_ok=True)
    plain(tmp_path)
    assert main(["inspect", str(tmp_path), str(tmp_path)]) == 0
    assert "it was trained since, or is another one" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").unlink()
    assert main(["inspect", str(tmp_path)]) == 0
    assert "warning" not in capsys.readouterr().err


def spanned(A: torch.Tensor, other: torch.Tensor) -> float:
    """By the projections on the two spaces, tr(P₁ P₂) / r, rather than by bases."""
    P = [M.double().T @ torch.linalg.pinv(M.double().T) for M in (A, other)]
    return float((P[0] @ P[1]).trace() / min(len(A), len(other)))


def test_overlaps_are_those_of_projections() -> None:
    torch.manual_seed(0)
    A, other = torch.randn(3, 20), torch.randn(5, 20)
    assert overlap(A, other) == pytest.approx(spanned(A, other), rel=1e-9)
    assert overlap(A, torch.randn(3, 3) @ A) == pytest.approx(1, abs=1e-5)
    assert overlap(A, torch.cat([A, other])) == pytest.approx(1, abs=1e-6)
    assert overlap(1e-6 * A, A * torch.tensor([[1e3], [1.0], [1e-3]])) == pytest.approx(1, abs=1e-6)
    half = torch.cat([A, torch.zeros(2, 20)])  # rows without energy span nothing
    assert overlap(half, A) == pytest.approx(1, abs=1e-6)
    assert overlap(torch.zeros(2, 20), A) != overlap(torch.zeros(2, 20), A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_rounding_adds_is_no_direction(dtype: torch.dtype) -> None:
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dependent = torch.cat([rows, torch.randn(4, 8, dtype=torch.float64) @ rows])
    found = basis(dependent.to(dtype))
    assert found.shape == (64, 8)
    assert overlap(found.T, rows) == pytest.approx(1, abs=1e-3)
    # A direction that is little, but more than rounding, is one.
    close = torch.cat([rows, rows[:1] + 40 * torch.finfo(dtype).eps * torch.randn(1, 64)])
    assert basis(close.to(dtype)).shape == (64, 9)


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_two_adapters(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    initialised(one, seed=1, start=start)
    initialised(two, seed=2)
    found = Comparison.of(one, two)
    reports = [filet.FiletReport.load(folder) for folder in (one, two)]
    assert [each.name for each in found.modules] == list(reports[0].modules)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for each in found.modules:
        A, other = (f[f"base_model.model.{each.name}.lora_A.weight"] for f in files)
        assert each.ranks == (4, 4)
        assert each.overlap == pytest.approx(spanned(A[:4], other), rel=1e-5)
        assert each.chance == 4 / A.shape[1]
        modules = [report.modules[each.name] for report in reports]
        chosen = [set(module.indices.tolist()) for module in modules]
        assert each.common == len(chosen[0] & chosen[1])
        assert each.energies == tuple(float(m.energies[m.indices].median()) for m in modules)
    assert main(["inspect", str(one), str(two)]) == 0
    assert found.table() in capsys.readouterr().out
    assert all(each.overlap == pytest.approx(1) for each in Comparison.of(two, two).modules)


def test_an_adapter_that_filet_did_not_make(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    initialised(one, seed=1)
    torch.manual_seed(1)
    get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj"])).save_pretrained(two)
    found = Comparison.of(one, two).modules
    assert {each.name.rpartition(".")[2] for each in found} == {"q_proj"}
    for each in found:
        assert each.ranks == (4, 8) and each.common is None and each.energies[1] is None
        assert each.overlap is not None and 0 < each.overlap < 1
    with pytest.raises(ValueError, match="no module in common"):
        names = load_file(two / "adapter_model.safetensors")
        renamed = {key.replace("q_proj", "k_proj"): value for key, value in names.items()}
        save_file(renamed, two / "adapter_model.safetensors")
        Comparison.of(one, two)


def test_two_files_of_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = [initialised(tmp_path / str(seed), seed) for seed in (1, 2)]
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for its, path in zip(statistics, paths, strict=True):
        its.save(path)
    found = Comparison.of(*paths).modules
    assert len(found) == len(statistics[0].moments)
    for each in found:
        for side, value in (("input", each.overlap), ("output", each.output)):
            S, T = (getattr(its.moments[each.name], side).sum.double() for its in statistics)
            S, T = (M.tril() + M.tril(-1).T for M in (S, T))
            truth = float((S * T).sum() / (S.norm() * T.norm()))
            assert value == pytest.approx(truth, rel=1e-9)
            assert value is not None and value < 0.9999
    assert main(["inspect", *map(str, paths)]) == 0
    assert "cosine" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two of a kind"):
        Comparison.of(paths[0], tmp_path / "1")
    with pytest.raises(FileNotFoundError, match="no adapter_model"):
        Comparison.of(tmp_path, tmp_path / "1")


class Page(HTMLParser):
    """What a page loads, shows and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        self.alts += [value or "" for key, value in attrs if key == "alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)


def test_pages_open_offline(tmp_path: Path) -> None:
    one, two = tmp_path / "a&b <x>", tmp_path / "two"
    for number, folder in enumerate((one, two)):
        initialised(folder, seed=number).save(f"{folder}.safetensors")
    pairs = [(one, two), (f"{one}.safetensors", f"{two}.safetensors")]
    commands = [["inspect", str(one)], *(["inspect", *map(str, pair)] for pair in pairs)]
    for index, command in enumerate(commands):
        path = tmp_path / f"{index}.html"
        assert main([*command, "--html", str(path)]) == 0
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        pictures = 2 if index == 2 else 1  # of inputs and of outputs
        assert len(page.links) == page.tags.count("img") == pictures
        assert "script" not in page.tags and all("of every layer" in said for said in page.alts)
        for link in page.links:
            kind, _, picture = link.partition(",")
            assert kind == "data:image/png;base64"
            assert base64.b64decode(picture).startswith(b"\x89PNG")
        assert not re.search(r"url\(|@import|https?:", text)
        modules = list(filet.FiletReport.load(one).modules)
        assert [row[0] for row in page.cells] == ["module", *modules]
        assert len({len(row) for row in page.cells}) == 1
        assert "a&amp;b &lt;x&gt;" in text and "<x>" not in text


def test_a_heat_map_of_experts_and_of_modules_in_no_layer() -> None:
    values = [(f"layers.{i}.experts.{e}.up", i / 2) for i in range(2) for e in range(3)]
    drawn = heat_map([*values, ("head", None)], "title")
    assert drawn.startswith(b"\x89PNG")


def test_a_report_of_nothing_has_a_page(tmp_path: Path) -> None:
    initialised(tmp_path, seed=1)
    report = filet.FiletReport.load(tmp_path)
    empty = dataclasses.replace(report, modules={}, left_default={"head": "why"})
    page = Page(empty.page("nothing"))
    assert "img" not in page.tags and json.dumps(page.cells).count("module") == 1
