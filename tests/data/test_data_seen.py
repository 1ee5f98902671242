"""Chats with images: the batches of TRL's collator, what its trainer is initialised on, and rows.

TRL where it is installed.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig

import filet
from filet import FiletConfig
from filet.data.samples import Fields, read_samples
from filet.data.seen import Seen, seen_of
from filet.data.sources import Source
from made_data import write_jsonl
from models import Case, linears, worst
from passes import FLOAT32
from pictures import true_of
from seeing import (
    CASES,
    PLACE,
    chats,
    filled,
    image,
    images_in,
    model_of,
    processor_of,
    sample_of,
    text,
    turn,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def seen(data: Path, kind: str = "llava", marked: bool = False, **options: Any) -> Seen:
    processor = processor_of(kind, marked)
    config = model_of(kind, processor).config
    settings = {"fields": Fields(), "samples": None, "seed": 0, "max_length": 200, **options}
    return seen_of(Source(data), processor, config, **settings)


def rows_in(folder: Path, *rows: Any) -> Path:
    images_in(folder)
    return write_jsonl(folder / "rows.jsonl", *rows)


IMAGES = [image(number) for number in range(4)]
FILES = [f"pictures/{number}.png" for number in range(4)]
ROWS = chats(FILES)
PAIRS = [
    {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "images": row["images"]}
    for row in ROWS
]
ASSISTANT = {"assistant_only_loss": True}
COMPLETION = {"completion_only_loss": True}


def opened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As TRL gets them."""
    return [
        {**row, "images": [IMAGES[FILES.index(name)] for name in row["images"]]} for row in rows
    ]


@pytest.mark.parametrize(
    ("rows", "marked", "ours", "theirs"),
    [
        (ROWS, True, {}, ASSISTANT),
        (ROWS, False, {"count_prompt": True}, {}),
        (PAIRS, False, {}, COMPLETION),
        (PAIRS, False, {"count_prompt": True}, {"completion_only_loss": False}),
    ],
    ids=["marks", "all", "completions", "pairs"],
)
@pytest.mark.parametrize("kind", CASES)
def test_batches_are_those_of_the_collator(
    kind: str, rows: Any, marked: bool, ours: Any, theirs: Any, tmp_path: Path
) -> None:
    """But for the places of images, which TRL counts as words where it counts all."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    processor = processor_of(kind, marked)
    collator = sft.DataCollatorForVisionLanguageModeling(processor, max_length=None, **theirs)
    expected = dict(collator(opened(rows)))
    config = model_of(kind, processor).config
    expected["labels"][expected["input_ids"] == config.image_token_id] = -100
    [found] = seen(rows_in(tmp_path, *rows), kind, marked, **ours).batches(len(rows))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_marks_and_prefixes_find_the_same_answers(tmp_path: Path) -> None:
    """By prefixes the line break after a turn as well."""
    data = rows_in(tmp_path, *ROWS)
    line = processor_of("gemma3").tokenizer("\n")["input_ids"]
    for plain, marked in zip(seen(data, "gemma3").rows, seen(data, "gemma3", True).rows,
                             strict=True):  # fmt: skip
        assert plain[0] == marked[0]
        words = [[i for i in labels if i != -100] for labels in (plain[1], marked[1])]
        assert [i for i in words[0] if [i] != line] == [i for i in words[1] if [i] != line]


def test_marks_that_an_image_displaced_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers before 5.18 has them: counted in the text with one mark for an image."""
    from transformers import LlavaProcessor

    own = LlavaProcessor._adjust_assistant_masks_indices

    def displaced(self: Any, made: Any, spans: Any) -> Any:
        made.pop("text_replacement_offsets", None)
        return own(self, made, spans)

    monkeypatch.setattr(LlavaProcessor, "_adjust_assistant_masks_indices", displaced)
    with pytest.raises(ValueError, match=r"row 1: LlavaProcessor of .* expected transformers 5.18"):
        seen(rows_in(tmp_path, ROWS[0]), marked=True)
    assert len(seen(rows_in(tmp_path, ROWS[2]), marked=True)) == 1  # without an image


@pytest.mark.parametrize("kind", ["qwen2-vl", "llava"])
def test_a_trainer_of_chats_with_images(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    processor = processor_of(kind, marked=True)
    model = model_of(kind, processor)
    names = linears(model, "lm_head")
    samples = []
    for row in opened(ROWS):
        sample = sample_of(processor_of(kind), filled(row, row["images"]))
        labels = sample["labels"]
        # Marked are the words and not the line break.
        ends = [p for p in range(1, len(labels)) if labels[p] != -100
                and (p + 1 == len(labels) or labels[p + 1] == -100)]  # fmt: skip
        labels[ends] = -100
        samples.append(sample)
    expected = true_of(Case(model, samples, names, True))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=3, report_to="none", use_cpu=True,
            bf16=False, max_length=None, assistant_only_loss=True, disable_tqdm=True,
            gradient_checkpointing=False, max_steps=1, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(opened(ROWS)).cast_column("images", List(Image())),
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names),
    )  # fmt: skip
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=None))
    assert report.samples == len(ROWS)
    found = {name: module.energies for name, module in report.modules.items()}
    error, name = worst(found, expected)
    assert error < FLOAT32, name
    trainer.train()


# Rows.


def test_images_come_in_many_ways(tmp_path: Path) -> None:
    """In columns or in the turns; as files, bytes and images; without a place, or with a text's."""
    words, blue = text("What colour is the sky?"), turn("assistant", text("It is blue."))
    inside = [turn("user", {**PLACE, "image": "pictures/0.png"}, words), blue]
    data = base64.b64encode((tmp_path / images_in(tmp_path)[0]).read_bytes()).decode()
    address = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    plain = [
        {"role": "user", "content": words["text"]},
        {"role": "assistant", "content": "It is blue."},
    ]
    marked = [
        {"from": "human", "value": f"<image>{words['text']}"},
        {"from": "gpt", "value": "It is blue."},
    ]
    rows = [
        ROWS[0],
        {**ROWS[0], "images": None, "image": "pictures/0.png"},
        {"messages": inside},
        {"messages": [turn("user", address, words), blue]},
        {"messages": [turn("user", {**PLACE, "base64": data}, words), blue]},
        {"messages": plain, "images": FILES[:1]},
        {"conversations": marked, "image": FILES[0]},
    ]  # fmt: skip
    expected = seen(rows_in(tmp_path, ROWS[0])).digest()
    for row in rows:
        assert seen(write_jsonl(tmp_path / "rows.jsonl", row)).digest() == expected, row
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}],
                         "images": List(Image())})  # fmt: skip
    saved = Dataset.from_list([{"messages": plain, "images": IMAGES[:1]}], features=features)
    saved.to_parquet(tmp_path / "rows.parquet")
    assert seen(tmp_path / "rows.parquet").digest() == expected
    assert expected != seen(rows_in(tmp_path, {**ROWS[0], "images": FILES[1:2]})).digest()


def test_a_text_with_the_mark_of_its_image(tmp_path: Path) -> None:
    """Taken as it is, as TRL takes it; without an image it is a text as of other models."""
    rows = [
        {"prompt": "<image>What is it?", "completion": " It is blue.", "image": FILES[0]},
        {"text": "It rains.", "image": None},
    ]
    made = seen(rows_in(tmp_path, *rows))
    tokenizer = processor_of("llava").tokenizer
    (ids, labels), (plain, _) = made.rows
    assert tokenizer.decode(ids) == "<image>" * 4 + "What is it? It is blue."
    assert tokenizer.decode([i for i in labels if i != -100]) == " It is blue."
    assert plain == [*tokenizer("It rains.")["input_ids"], tokenizer.eos_token_id]
    assert made.more[0].of_images["pixel_values"].shape == (1, 3, 8, 8)


def test_an_image_is_not_cut(tmp_path: Path) -> None:
    data = rows_in(tmp_path, ROWS[0], ROWS[1])
    whole = seen(data)
    length = len(whole.rows[0][0])
    with pytest.warns(UserWarning, match="dropped 1 of 2 samples: not the whole of an image"):
        cut = seen(data, max_length=length)
    assert cut.rows == whole.rows[:1]
    assert whole.cut == cut.cut == 0
    with pytest.warns(UserWarning, match="dropped 1 of 2"):
        shorter = seen(data, max_length=length - 1, count_prompt=True)
    assert shorter.cut == len(shorter) == 1
    with pytest.raises(ValueError, match="within max_length=4"):
        seen(data, max_length=4)


def test_images_of_other_sizes_come_in_batches_of_their_own(tmp_path: Path) -> None:
    made = seen(rows_in(tmp_path, *ROWS))
    made.more[1].of_images["pixel_values"] = torch.zeros(2, 3, 4, 4)
    sizes = [len(batch["input_ids"]) for batch in made.batches(4)]
    assert sizes == [1, 2, 1]
    shares = [made.share(rank, 3) for rank in range(3)]
    assert sorted(len(row[0]) for share in shares for row in share.rows) == sorted(
        len(row[0]) for row in made.rows
    )


HI = turn("assistant", text("hi"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [turn("user", PLACE), HI]}, "an image that is not there"),
        ({"messages": ROWS[0]["messages"], "images": FILES[:2]}, "2 images, and 1 places"),
        ({"messages": ROWS[0]["messages"], "images": ["no.png"]}, "no image at"),
        ({"messages": ROWS[0]["messages"], "images": ["rows.jsonl"]}, "cannot be opened"),
        ({"messages": ROWS[0]["messages"], "images": ["https://a/b"]}, "is an address"),
        ({"messages": ROWS[0]["messages"], "images": [3]}, "the image is a int"),
        ({"messages": ROWS[0]["messages"], "images": ["data:,a"]}, "cannot be opened"),
        ({"messages": ROWS[0]["messages"], "videos": ["a"]}, "'videos' is not read"),
        ({"messages": [turn("user", {"type": "video", "video": "a"}), HI]}, "of type 'video'"),
        ({"messages": [turn("user", {"no": "type"}), HI]}, "parts without a type"),
        ({"input_ids": [1, 2]}, "'input_ids' are for --task causal-lm"),
    ],
    ids=range(11),
)
def test_rows_that_are_refused(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        seen(rows_in(tmp_path, row))
    assert "row 1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_turned_image_is_seen_upright(tmp_path: Path) -> None:
    """As its file says (EXIF)."""
    (tmp_path / "pictures").mkdir()
    exif = IMAGES[0].getexif()
    exif[0x0112] = 6
    IMAGES[0].save(tmp_path / "turned.png", exif=exif)
    IMAGES[0].rotate(-90, expand=True).save(tmp_path / "upright.png")
    digests = {
        seen(rows_in(tmp_path, {**ROWS[0], "images": [name]})).digest()
        for name in ("turned.png", "upright.png")
    }
    assert len(digests) == 1


def test_other_tasks_read_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts that are no text.*--task vlm"):
        read_samples(Source(rows_in(tmp_path, ROWS[0])))


def test_bytes_are_opened(tmp_path: Path) -> None:
    stream = io.BytesIO()
    IMAGES[0].save(stream, "PNG")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "images": [{"bytes": stream.getvalue(), "path": None}]}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    [more] = seen(tmp_path / "rows.parquet").more
    assert more.of_images["pixel_values"].shape == (1, 3, 8, 8)
