"""The command line's data and models: conversations, draws, what is shown, names on the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of, sentence

from filet.cli.main import main
from filet.report.report import FiletReport
from made_data import write_jsonl

pytestmark = pytest.mark.usefixtures("no_picture")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    speakers = ("user", "assistant")
    return [{"role": speakers[n % 2], "content": text} for n, text in enumerate(texts)]


def test_conversations_by_a_template_of_a_file(
    init: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The assistant's turns count, and are shown; all turns count when asked."""
    write_jsonl(data, {"messages": turns("the cat", "sees a dog", "and", "a tree")})
    template = tmp_path / "template.jinja"
    message = error_of(capsys, [*init, "--chat-template", str(template)])
    assert f"no chat template at {template}" in message
    template.write_text(TEMPLATE)
    command = [*init, "--chat-template", str(template), "--target-modules", "q_proj"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "predicted     5 of 12 tokens; of one sample, in [[ and ]]:" in printed
    assert "<unk> the cat <unk>[[sees a dog]]<unk> and <unk>[[a tree]]" in printed
    assert FiletReport.load(tmp_path / "out" / "adapter").loss_terms == 5
    assert main([*command, "--count-prompt", "--overwrite"]) == 0
    assert FiletReport.load(tmp_path / "out" / "adapter").loss_terms == 11


def test_a_side_of_pairs(init: list[str], data: Path, tmp_path: Path) -> None:
    write_jsonl(data, {"prompt": "a cat ", "chosen": "sees two dogs", "rejected": "hears"})
    for side, terms in (("chosen", 4), ("rejected", 2)):  # and the end of the text
        output = tmp_path / side
        assert main([*init, *arguments("--side", side, "--output", output)]) == 0
        assert FiletReport.load(output).loss_terms == terms


def test_samples_are_drawn_from_the_whole_file_by_the_seed(
    init: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the file had those rows alone; streamed as well."""
    lines = data.read_text().splitlines(keepends=True)
    chosen = numpy.argsort(numpy.random.default_rng(5).random(len(lines)))[:6]
    assert max(chosen) >= 6
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[n] for n in sorted(chosen)))
    command = [*init, "--seed", "5", "--target-modules", "q_proj"]
    outputs = [tmp_path / name for name in ("drawn", "streamed", "alone")]
    assert main([*command, *arguments("--samples", 6, "--output", outputs[0])]) == 0
    streamed = arguments("--samples", 6, "--streaming", "--output", outputs[1])
    with monkeypatch.context() as patched:
        patched.setattr("filet.data.sources._chosen", None)  # what takes rows out of a copy
        assert main([*command, *streamed]) == 0
    assert main([*command, *arguments("--data", part, "--output", outputs[2])]) == 0
    expected = adapter_weights(outputs[2])
    for output in outputs[:2]:
        for name, weight in adapter_weights(output).items():
            assert torch.equal(weight, expected[name]), name


def test_data_to_keep_are_drawn_too(init: list[str], data: Path, tmp_path: Path) -> None:
    keep = write_jsonl(tmp_path / "keep.csv.jsonl", *({"text": sentence(n)} for n in range(90, 99)))
    saved = tmp_path / "saved.safetensors"
    more = arguments("--keep", keep, "--samples", 4, "--save-statistics", saved)
    assert main([*init, *more, "--target-modules", "q_proj"]) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.samples == 4


# -- names on the Hub ------------------------------------------------------------------------------


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model as cats/tiny, in a cache as a download leaves it; and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--cats--tiny"
    commit = "0123456789" * 4
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    return cache


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_model_by_its_name(engine: str, init: list[str], tmp_path: Path) -> None:
    command = [*init, *arguments("--engine", engine, "--target-modules", "q_proj")]
    assert main([*command, *arguments("--output", tmp_path / "folder")]) == 0
    named = arguments("--model", "cats/tiny", "--revision", "v1", "--output", tmp_path / "named")
    assert main([*command, *named]) == 0
    expected = adapter_weights(tmp_path / "folder")
    for name, weight in adapter_weights(tmp_path / "named").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.usefixtures("hub")
def test_names_that_are_not_there(
    init: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    message = error_of(capsys, [*init, "--model", "cats/large"])
    assert "--model: 'cats/large' is no folder here, nor found on the Hub or in its" in message
    message = error_of(capsys, [*init, "--model", "cats/tiny", "--revision", "v2"])
    assert "--model: 'cats/tiny' is no folder here" in message
    message = error_of(capsys, [*init, "--model", "tiny"])
    assert "--model: no folder 'tiny'; expected a folder, or owner/name" in message
    message = error_of(capsys, [*init, "--data", "cats/tales"])
    assert "no data set 'cats/tales': neither a path here, nor found on the Hub" in message
    # A path wins over a name.
    monkeypatch.chdir(tmp_path)
    Path("cats/tiny").mkdir(parents=True)
    assert "no config.json in cats/tiny" in error_of(capsys, [*init, "--model", "cats/tiny"])
