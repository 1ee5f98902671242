"""The model card: what it says is what the report says, and what it tells to run, runs."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import filet
from filet.adapter.card import card_of
from filet.report.table import hash_text
from initialised import code_of, initialized, run
from models import case, collate, llama, loader, peft_of

pytest.importorskip("matplotlib")

SAMPLES = case("llama").samples
needs_4bit = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("models") / "a|small"
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    return folder


def written(base: Path, output: Path, size: int = 4, **how: Any) -> filet.FiletReport:
    settings = filet.FiletConfig(start=how.pop("start", "zero"), samples=None)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return filet.initialize_folder(
        base, list(loader(SAMPLES, size)), output, lora, settings, device="cpu",
        show_progress_bar=False, **how,
    )  # fmt: skip


def facts(card: str) -> dict[str, str]:
    rows = re.findall(r"^\| ([\w' ]+) \| (.*) \|$", card, re.MULTILINE)
    return {label: text.replace("\\|", "|").strip("`") for label, text in rows}


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_card_says_what_the_report_does(
    engine: str, start: str, base: Path, tmp_path: Path
) -> None:
    report = written(base, tmp_path / "adapter", engine=engine, start=start)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["filet", "lora"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # the Hub takes no path
    said = facts(card.text)
    assert str(base) in said["base model"] and "float32" in said["base model"]
    assert report.data and said["hash of the samples"] == hash_text(report.data)
    assert said["data"] == (
        f"{report.samples} samples, {report.tokens} tokens, {report.loss_terms} loss terms"
    )
    assert said["directions"] == f"4 in each of {len(report.modules)} modules"
    for key, value in report.config.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        assert f"{key}={shown}" in said["settings"].split(", ")
    assert "filet-kernels" in said["made by"] and "quantised" not in said
    assert ("filet.json" in card.text) == (start == "untouched")
    assert (tmp_path / "adapter" / "energies.png").is_file() and "(energies.png)" in card.text
    assert hash_text(report.data) in report.table()
    assert filet.FiletReport.load(tmp_path / "adapter").data == report.data

    model = run(code_of(card.text, tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    batch = collate(SAMPLES[:2])
    with torch.no_grad():
        expected = plain(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert any(p.requires_grad for p in model.parameters()) == (start == "zero")


def test_equal_runs_write_equal_cards(base: Path, tmp_path: Path) -> None:
    """By either engine, in batches of another size."""
    written(base, tmp_path / "one", engine="memory")
    written(base, tmp_path / "two", engine="blockwise", size=3)
    for name in ("README.md", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@needs_4bit
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_quantised_base_is_quantised_as_it_was(engine: str, base: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    written(base, tmp_path / "adapter", engine=engine, quantization_config=how)
    card = (tmp_path / "adapter" / "README.md").read_text()
    said = facts(card)["quantised"].split(", ")
    assert {"quant_method=bitsandbytes", "load_in_4bit=True"} <= set(said)
    assert {"bnb_4bit_quant_type=nf4", "bnb_4bit_use_double_quant=True"} <= set(said)
    model = run(code_of(card, tmp_path / "adapter"))
    its, expected = model.config.quantization_config.to_dict(), how.to_dict()
    assert {key: its[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("someone/a-model", "someone/a-model"),
        ("/cache/hub/models--some-one--a-model/snapshots/0123abc", "some-one/a-model"),
        ("/models/a-model", None),
        ("tests/test_card.py", None),  # it could be one, but it is here
        (None, None),
    ],
)
def test_the_name_of_a_base_on_the_hub(
    path: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    model = peft_of(case("llama"))
    report = initialized(model)
    model.peft_config["default"].base_model_name_or_path = path
    card = ModelCard(card_of(model, "default", report, picture=False))
    assert card.data.base_model == name
    assert path is None or (name or path) in facts(card.text)["base model"]


def test_of_a_card_that_is_there_our_part_alone_is_renewed(tmp_path: Path) -> None:
    model = peft_of(case("llama"))
    report = initialized(model)
    filet.save_as_lora(model, tmp_path, report=report)
    path = tmp_path / "README.md"
    first = path.read_text()
    path.write_text(first.replace("library_name: peft", "license: mit") + "\nWhat I found out.\n")
    other = dataclasses.replace(report, samples=77)
    filet.save_as_lora(model, tmp_path, report=other)
    card = path.read_text()
    assert "license: mit" in card and card.endswith("\nWhat I found out.\n")
    assert "77 samples" in card and f"{report.samples} samples" not in card
    # Without a report nothing is said, and nothing that was said is lost.
    filet.save_as_lora(model, tmp_path)
    assert path.read_text() == card and filet.FiletReport.load(tmp_path).samples == 77
    # A card that somebody else wrote, PEFT say, whatever is in it.
    mine = b"---\nbroken: [\n---\nMine, in Latin-1: \xe4.\r\n"
    path.write_bytes(mine)
    filet.save_as_lora(model, tmp_path, report=report)
    assert path.read_bytes().startswith(mine.rstrip())
    assert facts(path.read_bytes().decode("latin-1")) == facts(first)


def test_after_the_residual_no_half_is_frozen(tmp_path: Path) -> None:
    model = peft_of(case("llama"))
    report = initialized(model, start="untouched")
    filet.write_residual(model)
    filet.save_as_lora(model, tmp_path, report=report)
    card = (tmp_path / "README.md").read_text()
    assert "filet.json" not in card and "less what they started as" in card
    assert "not recorded" in facts(card)["base model"]


def test_the_hash_is_of_the_samples() -> None:
    def of(data: Any, size: int = 4, side: str = "right", **more: Any) -> int:
        report: filet.FiletReport = initialized(
            peft_of(case("llama")), loader(data, size, side), **more
        )
        return report.data

    whole = of(SAMPLES)
    assert whole == of(SAMPLES, 5) == of(SAMPLES[::-1]) == of(SAMPLES, side="left")
    assert whole == of(SAMPLES, passes=2)
    changed = [*SAMPLES[:-1], {k: v.clone() for k, v in SAMPLES[-1].items()}]
    changed[-1]["labels"][-1] = -100
    others = [of(SAMPLES[:-1]), of(changed), of([*SAMPLES, SAMPLES[0]]), of(SAMPLES, samples=3)]
    assert len({whole, *others}) == 5
    assert others[3] == of(SAMPLES[:3])


@pytest.mark.parametrize("kind", ["t5", "vit", "bert tokens"])
def test_the_hash_of_other_data(kind: str) -> None:
    its = case(kind)
    found = [
        initialized(peft_of(its), loader(its.samples, size), forward_fn=its.forward_fn).data
        for size in (2, 5)
    ]
    assert found[0] and found[0] == found[1]


def test_the_hash_goes_with_the_statistics(tmp_path: Path) -> None:
    def of(samples: Any) -> filet.Statistics:
        config = filet.FiletConfig(samples=None)
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        return filet.collect_statistics(model, loader(samples), config, show_progress_bar=False)

    torch.manual_seed(0)
    parts = []
    for number, samples in enumerate((SAMPLES[:5], SAMPLES[5:])):
        torch.manual_seed(0)
        of(samples).save(tmp_path / f"{number}.safetensors")
        parts.append(filet.Statistics.load(tmp_path / f"{number}.safetensors"))
    torch.manual_seed(0)
    assert parts[0].merge(parts[1]).data == of(SAMPLES).data
    unknown = dataclasses.replace(parts[1], data=0)  # a file of 0.1
    assert parts[0].merge(unknown).data == 0
