"""What each process of a Trainer reads of the training's data: every sample once, and no hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import filet
from filet import FiletConfig
from models import case, collate, peft_of
from ranks import errors, run, values


class Stream(IterableDataset):
    """Rows, of which a loader does not know how many there are; ``uneven``, of several lengths."""

    def __init__(self, uneven: bool = False) -> None:
        self.uneven = uneven

    def __iter__(self) -> Any:
        ids = torch.arange(64 * 6).remainder(case("llama").model.config.vocab_size)
        for number, row in enumerate(ids.view(64, 6)):
            row = row[: 6 - number // 2 % 3] if self.uneven else row
            yield {"input_ids": row, "labels": row}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        num_train_epochs=1,
        **more,
    )


def read(rank: int, folder: Path, data: Any, collator: Any, samples: int | None) -> Any:
    """What a callback's report says that there was, and how many steps the training then has."""
    callback = filet.FiletInitCallback(FiletConfig(samples=samples))
    args = arguments(folder, max_steps=-1 if isinstance(data, list) else 2)
    trainer = Trainer(
        model=peft_of(case("llama")),
        args=args,
        train_dataset=data,
        data_collator=collator,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.report is not None
    return callback.report.samples, callback.report.tokens, trainer.state.global_step


@pytest.mark.parametrize("number", [3, 4, 7, 9])
@pytest.mark.parametrize("flat", [True, False])
def test_no_sample_is_read_twice(flat: bool, number: int, tmp_path: Path) -> None:
    """accelerate repeats some where batches do not come out even; flattened ones are one row."""
    rows = case("llama").samples[:number]
    rows = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows]
    collator: Any = DataCollatorWithFlattening() if flat else collate_lists
    found = values(run(2, read, tmp_path, rows, collator, None))
    batches = -(-number // 2)
    tokens = sum(len(row["input_ids"]) for row in rows)
    steps = -(-batches // 2)  # the training still has as many on both
    assert found == 2 * [(batches if flat else number, tokens, steps)]


def order(rank: int, folder: Path) -> Any:
    """The samples of each step of a training, with the callback and without it."""

    class Watched(Trainer):
        def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
            seen[-1].append(inputs["labels"].tolist())
            return super().training_step(model, inputs, *more)

    seen: list[Any] = []
    for callbacks in ([], [filet.FiletInitCallback()]):
        seen.append([])
        args = arguments(folder, max_steps=7, accelerator_config={"use_seedable_sampler": False})
        data: Any = case("llama").samples[:11]
        Watched(
            peft_of(case("llama")), args, collate, train_dataset=data, callbacks=callbacks
        ).train()
    return seen


def test_the_training_has_the_order_that_it_would_have(tmp_path: Path) -> None:
    for without, with_callback in values(run(2, order, tmp_path)):
        assert with_callback == without


def collate_lists(rows: list[dict[str, Any]]) -> Any:
    tensors = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    return collate([{**row, "attention_mask": torch.ones_like(row["labels"])} for row in tensors])


def test_a_stream_is_read_in_step(tmp_path: Path) -> None:
    """Its batches are handed out by the first process, to all or to none."""
    found = values(run(3, read, tmp_path, Stream(), collate, 16))
    assert found == 3 * [(18, 18 * 6, 2)]  # six each


@pytest.mark.parametrize("where", ["reading", "a forward"])
def test_a_stream_that_fails_leaves_nobody_waiting(where: str, tmp_path: Path) -> None:
    """The others wait for the first process's next batch, in accelerate, and not for its word."""
    if where == "reading":  # of batches that accelerate cannot put together
        first, second = errors(run(2, read, tmp_path, Stream(uneven=True), collate, None))
        assert first.startswith("RuntimeError: You can't use batches of different size")
        assert second  # the connection's
    else:
        first, second = errors(run(2, read_and_fail, tmp_path))
        assert first == "ValueError: rank 1: the second batch"
        assert second == "ValueError: the second batch"


def read_and_fail(rank: int, folder: Path) -> None:
    """The second process fails in its second batch."""
    seen = []

    def forward(model: Any, batch: Any) -> Any:
        seen.append(batch)
        if rank == 1 and len(seen) == 2:
            raise ValueError("the second batch")
        return model(**batch)

    Trainer(
        model=peft_of(case("llama")),
        args=arguments(folder, max_steps=2),
        train_dataset=Stream(),
        data_collator=collate,
        callbacks=[filet.FiletInitCallback(forward_fn=forward)],
    ).train()
