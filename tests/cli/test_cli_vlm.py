"""``--task vlm``: chats with images, beside float64 runs of the plain model on each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_cases import arguments, error_of
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from filet import FiletReport
from filet.cli.main import main
from filet.model.tasks import task_of
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


def test_a_base_in_four_bits(init: list[str], folders: Any, tmp_path: Path) -> None:
    """Quantised as it is loaded, its vision tower too; both engines say the same."""
    pytest.importorskip("bitsandbytes")
    folder, _ = folders["gemma3"]
    data = seen_files(tmp_path / "data")
    energies = []
    for engine in ("memory", "blockwise"):
        more = ("--engine", engine, "--quantize", "nf4", "--overwrite")
        assert main(command(init, folder, data, *more)) == 0
        report = FiletReport.load(tmp_path / "out" / "adapter")
        energies.append({name: its.energies for name, its in report.modules.items()})
    whole, text = energies
    assert worst(text, {name: whole[name] for name in text})[0] < 5e-6


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_data_to_keep_are_chats_or_text(
    engine: str, init: list[str], folders: Any, tmp_path: Path
) -> None:
    folder, _ = folders["gemma3"]
    data = seen_files(tmp_path / "data")
    kept = tmp_path / "data" / "kept.jsonl"
    write_jsonl(kept, chats([f"pictures/{n}.png" for n in range(4)])[1], {"text": "It rains."})
    more = ("--keep", kept, "--engine", engine, "--rank", 2)
    assert main(command(init, folder, data, *more)) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.config["select"] == "contrast" and report.samples == 4


def test_statistics_and_everything_counted(
    init: list[str], stats: list[str], folders: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a template of one's own; the places of images never count."""
    folder, _ = folders["llava"]
    data = seen_files(tmp_path / "data")
    template = tmp_path / "own.jinja"
    template.write_text(processor_of("llava").chat_template.replace("<|im_start|>", "Of "))
    saved = tmp_path / "moments.safetensors"
    given = arguments("--model", folder, "--data", data, "--output", saved, "--max-length", 200)
    assert main([*stats, *given, *arguments("--count-prompt", "--chat-template", template)]) == 0
    said = capsys.readouterr().out
    assert "O[[f user" in said
    terms, tokens = map(int, said.split("predicted")[1].split(" tokens")[0].split(" of "))
    images = 4 * 4
    assert terms == tokens - 4 - images  # the first of each sample is predicted by nothing
    args = arguments("--model", folder, "--statistics", saved, "--output", tmp_path / "adapter",
                     "--rank", 2, "--device", "cpu", "--no-progress")  # fmt: skip
    assert main(["init", *args]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "self"], "--keep self is not for --task vlm; expected it left out"),
        (["--task", "seq2seq-lm"], "transformers has no model for --task seq2seq-lm"),
        (["--new-head", "1"], "--new-head: --task vlm has no head of classes"),
        (["--max-length", "5"], "not the whole of an image within max_length=5"),
        (["--engine", "blockwise", "--target-modules", "fc1"], "of no layer in model.language_mod"),
        (["--target-modules", "no_such"], "LlavaForConditionalGeneration no module of that name"),
    ],
    ids=range(6),
)
def test_what_is_refused(
    options: list[str], said: str, init: list[str], folders: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, _ = folders["llava"]
    data = seen_files(tmp_path / "data")
    assert said in error_of(capsys, command(init, folder, data, *options))


def test_a_folder_without_a_processor(
    init: list[str], folders: Any, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A tokenizer alone is none; nor is a model that reads text one that sees."""
    folder = tmp_path / "blind"
    folders["llava"][1].save_pretrained(folder)
    data = seen_files(tmp_path / "data")
    message = error_of(capsys, command(init, folder, data))
    assert "no processor of images and text can be loaded" in message
    processor_of("llava").tokenizer.save_pretrained(folder)
    message = error_of(capsys, command(init, folder, data))
    assert "processor of images and text" in message
    message = error_of(capsys, command(init, model_folder, data, "--task", "vlm"))
    assert "of which transformers has no model for --task vlm" in message


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["AForConditionalGeneration"], "vision_config": {}}, "vlm"),
        ({"architectures": ["AForConditionalGeneration"], "image_token_id": 3}, "vlm"),
        (
            {
                "architectures": ["AForConditionalGeneration"],
                "vision_config": {},
                "is_encoder_decoder": True,
            },
            "seq2seq-lm",
        ),
        ({"architectures": ["AForConditionalGeneration"]}, "causal-lm"),
        ({"architectures": ["AForCausalLM"], "vision_config": {}}, "causal-lm"),
    ],
    ids=range(5),
)
def test_what_a_config_says(config: dict[str, Any], task: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert task_of(tmp_path) == task
