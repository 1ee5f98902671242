"""Tasks other than causal language models: beside float64 runs, and heads that are not there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cli_cases import adapter_weights, arguments, error_of, sentence
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    BartModel,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTImageProcessorPil,
)

from filet import FiletReport
from filet.cli.main import main
from filet.data.images import images_of
from filet.data.samples import Fields
from filet.data.sources import Source
from filet.data.tasks import encoded_for
from made_data import write_jsonl
from models import CLASSES, case, true_energies, worst
from oldest_peft import needs, older_than
from passes import FLOAT32

pytestmark = pytest.mark.usefixtures("no_picture")

ROWS = range(9)


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    """Words, of which one that is never seen is the mask."""
    made = PreTrainedTokenizerFast.from_pretrained(model_folder)
    made.mask_token = "<unk>"
    return made


def folder_of(model: Any, tokenizer: Any, goal: Path) -> Path:
    model.save_pretrained(goal)
    tokenizer.save_pretrained(goal)
    return goal


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def of_classes(tokenizer: Any, data: Path) -> list[dict[str, torch.Tensor]]:
    write_jsonl(data, *({"sentence": sentence(n), "label": n % CLASSES} for n in ROWS))
    return [
        {"input_ids": ids(tokenizer, sentence(n)), "labels": torch.tensor(n % CLASSES)}
        for n in ROWS
    ]


def of_tags(tokenizer: Any, data: Path) -> list[dict[str, torch.Tensor]]:
    words = [sentence(n).split() for n in ROWS]
    tags = [[(n + k) % CLASSES for k in range(len(each))] for n, each in enumerate(words)]
    names = [[f"LABEL_{tag}" for tag in each] for each in tags]
    write_jsonl(data, *({"tokens": w, "ner_tags": t} for w, t in zip(words, names, strict=True)))
    return [
        {"input_ids": ids(tokenizer, " ".join(w)), "labels": torch.tensor(t)}
        for w, t in zip(words, tags, strict=True)
    ]


def of_pairs(tokenizer: Any, data: Path) -> list[dict[str, torch.Tensor]]:
    write_jsonl(data, *({"prompt": sentence(n), "completion": " " + sentence(n + 9)} for n in ROWS))
    return [
        {
            "input_ids": ids(tokenizer, sentence(n)),
            "attention_mask": torch.ones_like(ids(tokenizer, sentence(n))),
            "labels": ids(tokenizer, sentence(n + 9)),
        }
        for n in ROWS
    ]


@pytest.mark.parametrize(
    ("kind", "task", "made"),
    [
        ("bert class", "seq-cls", of_classes),
        ("bert tokens", "token-cls", of_tags),
        ("bart", "seq2seq-lm", of_pairs),
        ("t5", "seq2seq-lm", of_pairs),
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_energies_of_a_task(
    named: bool, kind: str, task: str, made: Any, init: list[str], data: Path, tokenizer: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The task is found by the config; each sample alone and unpadded in float64."""
    if task == "seq2seq-lm":
        needs("0.21", "makes none of these with today's transformers")
    model = case(kind).model
    folder = folder_of(model, tokenizer, tmp_path / "model")
    samples = made(tokenizer, data)
    command = [*init, "--model", str(folder)]
    assert main([*command, "--task", task] if named else command) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.samples == len(samples)
    assert report.loss_terms == sum(sample["labels"].numel() for sample in samples)
    expected = true_energies(model, report.modules, samples)
    found = {name: module.energies for name, module in report.modules.items()}
    error, name = worst(found, expected)
    assert error < FLOAT32, name


def test_pairs_by_a_peft_that_cannot(
    init: list[str], data: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not older_than("0.21"):
        pytest.skip("this PEFT can")
    folder = folder_of(case("t5").model, tokenizer, tmp_path / "model")
    of_pairs(tokenizer, data)
    found = error_of(capsys, [*init, "--model", str(folder)])
    assert found.endswith("expected PEFT >= 0.21 for task_type='SEQ_2_SEQ_LM'")


@pytest.mark.parametrize(
    ("task", "made", "labelled"),
    [
        ("seq-cls", of_classes, True),
        ("seq-cls", of_classes, False),
        ("token-cls", of_tags, True),
        ("seq2seq-lm", of_pairs, True),
        ("masked-lm", of_classes, True),
    ],
)
def test_samples_of_a_task_that_are_cut(
    task: str, made: Any, labelled: bool, tokenizer: Any, data: Path
) -> None:
    """What is cut is what the tokenizer cuts, and counted; of a pair both sides together."""
    if task == "masked-lm":
        write_jsonl(data, *({"text": sentence(n)} for n in ROWS))
    else:
        made(tokenizer, data)
    sides = [(n, n + 9) if task == "seq2seq-lm" else (n,) for n in ROWS]
    lengths = [[len(sentence(n).split()) for n in each] for each in sides]

    def encoded(length: int) -> Any:
        return encoded_for(
            task, Source(data), tokenizer, case("bert class").model.config,
            fields=Fields(), samples=None, seed=0, max_length=length, labelled=labelled,
        )  # fmt: skip

    for length in (7, 12):
        found = encoded(length)
        assert found.cut == sum(any(n > length for n in each) for each in lengths)
        assert [len(row[0]) for row in found.rows] == [min(each[0], length) for each in lengths]
    assert found.cut == 0


def masked(tokenizer: Any, data: Path, seed: int) -> Any:
    settings = case("bert masked").model.config
    return encoded_for(
        "masked-lm", Source(data), tokenizer, settings,
        fields=Fields(), samples=None, seed=seed, max_length=16,
    )  # fmt: skip


def test_masked_words(init: list[str], data: Path, tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(data, *({"text": sentence(n)} for n in ROWS))
    model = case("bert masked").model
    folder = folder_of(model, tokenizer, tmp_path / "model")
    assert main([*init, "--model", str(folder), "--seed", "3"]) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    rows = masked(tokenizer, data, 3).rows
    assert report.loss_terms == sum(label != -100 for _, labels in rows for label in labels)
    samples = [
        {"input_ids": torch.tensor(words), "labels": torch.tensor(labels)} for words, labels in rows
    ]
    found = {name: module.energies for name, module in report.modules.items()}
    assert worst(found, true_energies(model, report.modules, samples))[0] < FLOAT32


def test_what_is_masked(data: Path, tokenizer: Any) -> None:
    """15% of the words, at least one; most of them by the mask, some by others, by the seed."""
    words = "the a cat dog bird sees hears finds and one two red blue small old house".split()
    numbers = numpy.random.default_rng(0).integers(len(words), size=(400, 14))
    texts = [" ".join(words[n] for n in line) for line in numbers]
    write_jsonl(data, *({"text": text} for text in texts), {"text": "cat"})
    *rows, short = masked(tokenizer, data, 1).rows
    assert short[1] == tokenizer("cat")["input_ids"]
    shares = {"mask": 0, "same": 0, "other": 0}
    for text, (found, labels) in zip(texts, rows, strict=True):
        plain = tokenizer(text)["input_ids"]
        places = [place for place, label in enumerate(labels) if label != -100]
        assert len(places) == round(0.15 * 14)
        assert [labels[place] for place in places] == [plain[place] for place in places]
        for place, (before, after) in enumerate(zip(plain, found, strict=True)):
            assert before == after or place in places
            if place in places:
                kind = "same" if after == before else "other"
                shares["mask" if after == tokenizer.mask_token_id else kind] += 1
    total = sum(shares.values())
    assert shares["mask"] / total == pytest.approx(0.8, abs=0.05)
    assert shares["same"] / total == pytest.approx(0.1, abs=0.04)
    assert masked(tokenizer, data, 1).rows[:-1] == rows
    assert masked(tokenizer, data, 2).rows[:-1] != rows


def base_folder(tokenizer: Any, tmp_path: Path) -> Path:
    return folder_of(BertModel(case("bert class").model.config), tokenizer, tmp_path / "base")


def test_a_new_head(
    init: list[str], data: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where it is not asked for; drawn by its seed, and saved with the adapter."""
    folder = base_folder(tokenizer, tmp_path)
    write_jsonl(data, *({"text": sentence(n), "label": n % 3} for n in ROWS))
    command = arguments(*init, "--model", folder, "--task", "seq-cls", "--overwrite")
    message = error_of(capsys, command)
    assert "has no weight for classifier.bias: the head of its classes" in message
    heads = []
    for seed in (4, 4, 5):
        state = torch.get_rng_state()
        assert main([*command, *arguments("--new-head", seed, "--num-labels", 3)]) == 0
        assert torch.equal(torch.get_rng_state(), state)
        assert f"head          new, drawn by seed {seed}; saved" in capsys.readouterr().out
        saved = adapter_weights(tmp_path / "out" / "adapter")
        [head] = [value for key, value in saved.items() if key.endswith("classifier.weight")]
        heads.append(head)
    assert heads[0].shape == (3, 24)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    again = PeftModel.from_pretrained(model, str(tmp_path / "out" / "adapter"))
    loaded = again.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(loaded.weight, heads[2])


SMALL = {
    "vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 3, "pad_token_id": 1, "max_position_embeddings": 32,
}  # fmt: skip
BASES = {
    "dense and out": lambda: RobertaModel(RobertaConfig(**SMALL), add_pooling_layer=False),
    "pooler beside": lambda: DebertaV2Model(DebertaV2Config(**SMALL)),
    "two layers": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=20, dim=24, hidden_dim=40, n_layers=1, n_heads=3)
    ),
    "of another name": lambda: BartModel(case("bart").model.config),
    "decoder": lambda: LlamaModel(LlamaConfig(**SMALL)),
}


@pytest.mark.parametrize("kind", BASES)
def test_all_of_a_new_head_is_saved(
    kind: str, init: list[str], data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Two loads of the base, each with another random head, are one model with the adapter."""
    folder = folder_of(BASES[kind](), tokenizer, tmp_path / "base")
    write_jsonl(data, *({"text": f"{sentence(n)} <eos>", "label": n % 2} for n in ROWS))
    command = arguments(*init, "--model", folder, "--task", "seq-cls", "--new-head", 3)
    assert main([*command, "--rank", "2"]) == 0
    words = torch.tensor([[3, 4, 5, 2]])
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model = PeftModel.from_pretrained(model.eval(), str(tmp_path / "out" / "adapter"))
        with torch.no_grad():
            logits.append(model(words).logits)
    assert torch.equal(*logits) and logits[0].abs().max() > 0
    adapted = FiletReport.load(tmp_path / "out" / "adapter").modules
    assert adapted and not any("classif" in name or "score" in name for name in adapted)


def test_heads_that_do_not_fit(
    init: list[str], data: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(data, {"text": "the cat", "label": CLASSES})
    folder = folder_of(case("bert class").model, tokenizer, tmp_path / "model")
    command = arguments(*init, "--model", folder)
    assert f"label {CLASSES}; expected 0 … {CLASSES - 1}" in error_of(capsys, command)
    write_jsonl(data, {"text": "the cat", "label": "LABEL_1"}, {"text": "a dog", "label": 0})
    assert "expected no --new-head" in error_of(capsys, [*command, "--new-head", "1"])
    message = error_of(capsys, [*command, "--engine", "blockwise"])
    assert "--engine blockwise is for --task causal-lm and vlm, and this is seq-cls" in message
    message = error_of(capsys, [*command, "--task", "seq2seq-lm"])
    assert "transformers has no model for --task seq2seq-lm" in message
    # A pooler that is not there is no head.
    base = BertForTokenClassification(case("bert class").model.config)
    poolless = folder_of(base, tokenizer, tmp_path / "poolless")
    command = arguments(*init, "--model", poolless, "--task", "seq-cls", "--new-head", 1)
    assert "has no weight for bert.pooler.dense.bias" in error_of(capsys, command)
    command = [*arguments(*init, "--task", "causal-lm"), "--new-head", "1"]
    assert "--new-head: --task causal-lm has no head of classes" in error_of(capsys, command)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("bert class", {"label": 1}, "no column text or sentence"),
        ("bert class", {"text": ["the"], "label": 1}, "the text is a list; expected a string"),
        ("bert class", {"text": "the", "label": "no"}, "label 'no'; expected 0 …"),
        ("bert tokens", {"tokens": ["a", "b"], "tags": [1]}, "a list of as many labels"),
        ("bert masked", {"messages": [{"role": "user", "content": "a"}]}, "is for another task"),
        ("bart", {"text": "a cat"}, "expected a prompt and a response"),
    ],
)
def test_rows_that_do_not_fit(
    kind: str, row: dict[str, Any], said: str, init: list[str], data: Path, tokenizer: Any,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_jsonl(data, row)
    folder = folder_of(case(kind).model, tokenizer, tmp_path / "model")
    message = error_of(capsys, arguments(*init, "--model", folder))
    assert said in message and "row 1" in message


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("bart", ["--count-prompt"], "--count-prompt is not for --task seq2seq-lm"),
        ("bert masked", ["--chat-template", "x"], "--chat-template is not for --task masked-lm"),
        ("bert class", ["--prompt-field", "a"], "--prompt-field is not for --task seq-cls"),
        ("bert tokens", ["--side", "rejected"], "--side is not for --task token-cls"),
        ("vit", ["--text-field", "a"], "--text-field is not for --task image-cls"),
        ("bart", ["--keep", "self"], "--keep self is not for --task seq2seq-lm"),
        ("vit", ["--keep", "self"], "--keep self is not for --task image-cls"),
    ],
)
def test_options_of_other_data(
    kind: str, options: list[str], said: str, init: list[str], data: Path, tokenizer: Any,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = folder_of(case(kind).model, tokenizer, tmp_path / "model")
    assert said in error_of(capsys, arguments(*init, "--model", folder, *options))


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_images(form: str, init: list[str], tmp_path: Path) -> None:
    """By the model's processor; a folder's classes are those of config.json, by their names."""
    model = copy.deepcopy(case("vit").model)
    names = ["red", "blue", "dog", "ant", "cat"]  # a folder sorts them in another way
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor.save_pretrained(folder)
    generator = numpy.random.default_rng(0)
    samples, rows = [], []
    for number in ROWS:
        image = Image.fromarray(generator.integers(256, size=(11, 9, 3), dtype=numpy.uint8))
        rows.append((image, names[number % CLASSES]))
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        samples.append({"pixel_values": pixels, "labels": torch.tensor(number % CLASSES)})
    data = tmp_path / "images"
    if form == "folder":
        for number, (image, name) in enumerate(rows):
            (data / name).mkdir(parents=True, exist_ok=True)
            image.save(data / name / f"{number}.png")
    else:
        data = tmp_path / "images.parquet"
        Dataset.from_dict(
            {"image": [image for image, _ in rows], "label": [name for _, name in rows]}
        ).to_parquet(data)
    assert main(arguments(*init, "--model", folder, "--data", data)) == 0
    report = FiletReport.load(tmp_path / "out" / "adapter")
    assert report.samples == report.loss_terms == len(samples)
    found = {name: module.energies for name, module in report.modules.items()}
    error, name = worst(found, true_energies(model, report.modules, samples))
    assert error < FLOAT32, name


def test_images_that_do_not_fit(
    init: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "model", tmp_path / "images"
    case("vit").model.save_pretrained(folder)
    for name in ("unheard", "of"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(data / name / "a.png")
    command = arguments(*init, "--model", folder, "--data", data)
    assert "no image processor can be loaded" in error_of(capsys, command)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    assert main([*command, "--batch-size", "auto"]) == 0  # by their numbers
    message = error_of(capsys, [*command, "--data", str(data / "unheard"), "--overwrite"])
    assert "row 1: the image has no class; expected a column label or" in message
    (data / "of" / "deeper").mkdir()
    Image.new("RGB", (9, 9)).save(data / "of" / "deeper" / "b.png")
    message = error_of(capsys, [*command, "--overwrite"])
    assert "in folders that have the names of the classes, all equally deep" in message
    text = write_jsonl(tmp_path / "text.jsonl", {"image": "a.png", "label": 1})
    message = error_of(capsys, [*command, "--data", str(text), "--overwrite"])
    assert "row 1: the image is a str; expected an image" in message


@pytest.mark.parametrize("where", [".", "train", "train/nested"])
def test_a_folder_of_one_class(where: str, tmp_path: Path) -> None:
    """It is read with its label, as folders of several classes are."""
    data = tmp_path / "images"
    (data / where / "dog").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (9, 9)).save(data / where / "dog" / f"{number}.png")
    rows = Source(data).rows()
    assert rows.features["label"].names == ["dog"] and rows["label"] == [0, 0]


def test_a_folder_of_a_split_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a.png")
    assert list(Source(tmp_path).rows().features) == ["image"]


def test_a_folder_of_one_class_by_its_name(tmp_path: Path) -> None:
    """Its number is the model's, of the name in config.json, not the data set's own 0."""
    model = copy.deepcopy(case("vit").model)
    names = ["red", "blue", "dog", "ant", "cat"]
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    image = Image.fromarray(numpy.full((9, 9, 3), 70, dtype=numpy.uint8))
    (tmp_path / "images" / "ant").mkdir(parents=True)
    image.save(tmp_path / "images" / "ant" / "a.png")
    found = images_of(Source(tmp_path / "images"), processor, model.config, samples=None, seed=0)
    assert [label for _, label in found.rows] == [3]
