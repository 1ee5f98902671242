"""``--keep`` for other tasks than causal language models: what Python's ``keep=`` takes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cli_cases import arguments, error_of, sentence
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

import filet
from filet import FiletConfig, FiletReport
from filet.cli.main import main
from filet.data.samples import Fields
from filet.data.sources import Source
from filet.data.tasks import encoded_for
from made_data import write_jsonl
from models import CLASSES, case
from oldest_peft import needs

pytestmark = pytest.mark.usefixtures("no_picture")

KEPT = range(40, 47)


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    made = PreTrainedTokenizerFast.from_pretrained(model_folder)
    made.mask_token = "<unk>"
    return made


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])[None]


Batches = list[dict[str, torch.Tensor]]


def texts(tokenizer: Any, folder: Path) -> tuple[Path, Batches]:
    """Plain text, without any class."""
    path = folder / "keep.txt"
    path.write_text("".join(sentence(n) + "\n" for n in KEPT))
    return path, [{"input_ids": ids(tokenizer, sentence(n))} for n in KEPT]


def words(tokenizer: Any, folder: Path) -> tuple[Path, Batches]:
    """Of another data set: the model knows no such classes."""
    rows = ({"tokens": sentence(n).split(), "ner_tags": ["no", "such"]} for n in KEPT)
    path = write_jsonl(folder / "keep.jsonl", *rows)
    return path, [{"input_ids": ids(tokenizer, sentence(n))} for n in KEPT]


def masked(tokenizer: Any, folder: Path) -> tuple[Path, Batches]:
    """Masked as the task's are, by the seed."""
    path, _ = texts(tokenizer, folder)
    rows = encoded_for(
        "masked-lm", Source(path), tokenizer, case("bert masked").model.config,
        fields=Fields(), samples=None, seed=0, max_length=16,
    ).rows  # fmt: skip
    assert any(
        row != tokenizer(sentence(n))["input_ids"] for (row, _), n in zip(rows, KEPT, strict=True)
    )
    return path, [{"input_ids": torch.tensor([row])} for row, _ in rows]


def pairs(tokenizer: Any, folder: Path) -> tuple[Path, Batches]:
    rows = ({"prompt": sentence(n), "completion": sentence(n + 9)} for n in KEPT)
    path = write_jsonl(folder / "keep.jsonl", *rows)
    return path, [
        {"input_ids": ids(tokenizer, sentence(n)), "labels": ids(tokenizer, sentence(n + 9))}
        for n in KEPT
    ]


def write_task(kind: str, folder: Path) -> Path:
    n, w = sentence, str.split
    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "bert class": lambda k: {"text": n(k), "label": k % CLASSES},
        "bert tokens": lambda k: {"words": w(n(k)), "tags": [k % CLASSES] * len(w(n(k)))},
        "bert masked": lambda k: {"text": n(k)},
        "bart": lambda k: {"prompt": n(k), "completion": n(k + 3)},
        "t5": lambda k: {"prompt": n(k), "completion": n(k + 3)},
    }
    return write_jsonl(folder / "task.jsonl", *map(rows[kind], range(9)))


def assert_kept(kind: str, saved: Path, batches: Batches) -> None:
    """What the command kept is what Python's ``keep=`` keeps of the samples one by one."""
    found = filet.Statistics.load(saved)
    model = case(kind).model
    peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=list(found.fingerprints)))
    try:
        # Any task will do: it has no part in what is kept but for the spaces, which sizes decide.
        labels = model(**batches[0]).logits.argmax(-1)
        task = [{**batches[0], "labels": labels}]
        expected = filet.collect_statistics(
            peft_model, task, FiletConfig(samples=None), show_progress_bar=False, keep=batches
        )
    finally:
        peft_model.unload()
    assert found.keep_samples == len(batches) and found.keep_tokens == expected.keep_tokens
    assert found.keep is not None and expected.keep is not None
    assert found.keep.keys() == expected.keep.keys()
    for name, its in expected.keep.items():
        mine = found.keep[name]
        assert mine.space == its.space and int(mine.count) == int(its.count) > 0
        lower = its.sum.tril()
        close = {"rtol": 1e-4, "atol": 1e-5 * float(lower.abs().max())}
        torch.testing.assert_close(mine.sum, lower, **close)


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("bert class", texts),
        ("bert class", words),
        ("bert tokens", texts),
        ("bert tokens", words),
        ("bert masked", masked),
        ("bart", pairs),
        ("t5", pairs),
    ],
)
def test_texts_to_keep(
    kind: str, made: Any, init: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    if made is pairs:
        needs("0.21", "makes none of these with today's transformers")
    folder, saved = tmp_path / "model", tmp_path / "saved.safetensors"
    case(kind).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep, batches = made(tokenizer, tmp_path)
    argv = arguments(*init, "--model", folder, "--data", write_task(kind, tmp_path))
    argv += arguments("--keep", keep, "--save-statistics", saved, "--batch-size", 3)
    assert main(argv) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.config["select"] == "contrast" and report.samples == 9
    assert_kept(kind, saved, batches)


@pytest.mark.parametrize("form", ["flat", "folders"])
def test_images_to_keep(form: str, init: list[str], tmp_path: Path) -> None:
    """In one folder, or in those of classes that the model does not know."""
    folder, saved = tmp_path / "model", tmp_path / "saved.safetensors"
    case("vit").model.save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor.save_pretrained(folder)
    generator = numpy.random.default_rng(0)
    batches = []
    for number in range(7):
        image = Image.fromarray(generator.integers(256, size=(11, 9, 3), dtype=numpy.uint8))
        for of in (f"data/{number % 2}", "keep" if form == "flat" else f"keep/unheard{number}"):
            (tmp_path / of).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / of / f"{number}.png")
        batches.append(dict(processor(images=[image], return_tensors="pt")))
    argv = arguments(*init, "--model", folder, "--data", tmp_path / "data")
    argv += arguments("--keep", tmp_path / "keep", "--save-statistics", saved)
    assert main(argv) == 0
    assert FiletReport.load(tmp_path / "out" / "adapter").config["select"] == "contrast"
    assert_kept("vit", saved, batches)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("bert class", {"label": 1}, "no column text or sentence or tokens or words"),
        ("bert tokens", {"tokens": [1, 2]}, "expected a text, or a list of words"),
        ("bart", {"text": "a cat"}, "expected a prompt and a response"),
    ],
)
def test_rows_that_do_not_fit(
    kind: str, row: dict[str, Any], said: str, init: list[str], tokenizer: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    case(kind).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep = write_jsonl(tmp_path / "keep.jsonl", row)
    argv = arguments(*init, "--model", folder, "--data", write_task(kind, tmp_path))
    message = error_of(capsys, [*argv, "--keep", str(keep)])
    assert f"{keep}, row 1" in message and said in message
