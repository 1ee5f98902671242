"""A model that sees, trained on chats with images by TRL's trainer, from FILet's directions.

    python examples/vlm.py --model MODEL --data chats.jsonl --output ADAPTER

MODEL is a local folder with its processor. A row of DATA has ``messages``, whose places for images
are ``{"type": "image"}``, and ``images``, paths from the folder that DATA lies in. The adapter
loads by plain PEFT on AutoModelForImageTextToText.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
import trl
from peft import LoraConfig

import filet


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(argv)

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype)
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    rows = datasets.Dataset.from_json(str(options.data))
    rows = rows.map(lambda row: {"images": [str(options.data.parent / i) for i in row["images"]]})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))

    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(options.output / "checkpoints"), max_steps=options.steps, learning_rate=1e-3,
            per_device_train_batch_size=2, logging_steps=10, save_strategy="no", report_to="none",
            bf16=dtype == torch.bfloat16, max_length=None,
            # Without marks of the answers in the template all tokens count.
            assistant_only_loss="{% generation %}" in (processor.chat_template or ""),
        ),
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(r=options.rank, target_modules="all-linear"),
    )  # fmt: skip
    filet.initialize_from_trainer(trainer)
    trainer.train()
    filet.save_as_lora(trainer.model, options.output)


if __name__ == "__main__":
    main()
