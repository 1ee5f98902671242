"""``--task vlm``: chats with images, beside float64 runs of the plain model on each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_cases import arguments
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from filet import FiletReport
from filet.cli.main import main
from made_data import write_jsonl
from models import Case, worst
from passes import FLOAT32
from pictures import true_of
from seeing import (
    CASES,
    chats,
    filled,
    folder_of,
    image,
    images_in,
    processor_of,
    sample_of,
)

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    place = tmp_path_factory.mktemp("seeing")
    return {kind: (place / kind, folder_of(kind, place / kind)) for kind in CASES}


@pytest.fixture(autouse=True)
def without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's processor has one of videos, which needs torchvision; it is made, not loaded."""
    load = transformers.AutoProcessor.from_pretrained

    def loaded(folder: str, **options: Any) -> Any:
        kind = Path(folder).name
        return processor_of(kind) if kind.startswith("qwen") else load(folder, **options)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", loaded)


def expected(kind: str, model: Any, names: Any) -> dict[str, torch.Tensor]:
    processor = processor_of(kind)
    images = [image(number) for number in range(4)]
    taken = [[images[0]], images[1:3], [], images[3:]]
    samples = [
        sample_of(processor, filled(row, its))
        for row, its in zip(chats([]), taken, strict=True)
    ]  # fmt: skip
    return true_of(Case(model, samples, list(names), True))


def seen_files(folder: Path) -> Path:
    """A .jsonl beside its images."""
    return write_jsonl(folder / "rows.jsonl", *chats(images_in(folder)))


def command(init: list[str], folder: Path, data: Path, *more: Any) -> list[str]:
    return [*init, *arguments("--model", folder, "--data", data, "--max-length", 200, *more)]


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
@pytest.mark.parametrize("kind", CASES)
def test_energies_of_chats_with_images(
    kind: str, engine: str, init: list[str], folders: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The task is found by the config; the adapter loads by PEFT on the class it names."""
    folder, model = folders[kind]
    data = seen_files(tmp_path / "data")
    assert main(command(init, folder, data, "--engine", engine)) == 0
    said = capsys.readouterr()
    assert "[[It is blue.<|im_end|>" in said.out
    output = tmp_path / "out" / "adapter"
    report = FiletReport.load(output)
    assert report.samples == 4
    found = {name: module.energies for name, module in report.modules.items()}
    text_alone = all("language_model" in name for name in found)
    assert text_alone == (engine == "blockwise") == ("beside the text's blocks" in said.err)
    error, name = worst(found, expected(kind, model, found))
    assert error < FLOAT32, name
    base = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, str(output))
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in loaded.named_modules()
        if name.endswith("lora_A.default")
    }
    assert adapted == {*found}
