"""Image classes by transformers' Trainer, from FILet's directions, with a head drawn anew.

    python examples/vision.py --model MODEL --data FOLDER --output ADAPTER

MODEL is a ViT or DINOv2, DATA a folder of folders of images that have the names of the classes.
"""

import argparse
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model

import filet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    for name, value in {"rank": 32, "samples": 320, "steps": 100, "learning-rate": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    rows = datasets.load_dataset("imagefolder", data_dir=args.data, split="train")
    names = dict(enumerate(rows.features["label"].names))
    parts = rows.train_test_split(test_size=0.1, seed=0, stratify_by_column="label")
    read = transformers.AutoImageProcessor.from_pretrained(args.model)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = read([row["image"].convert("RGB") for row in rows], return_tensors="pt")
        return {**pixels, "labels": torch.tensor([row["label"] for row in rows])}

    transformers.set_seed(0)  # of the head, and the same in all processes
    model = transformers.AutoModelForImageClassification.from_pretrained(
        args.model, id2label=names, ignore_mismatched_sizes=True
    )
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
    lora.modules_to_save = ["classifier"]
    model = get_peft_model(model, lora)
    settings = transformers.TrainingArguments(
        args.output, max_steps=args.steps, remove_unused_columns=False, report_to="none",
        per_device_train_batch_size=16, learning_rate=args.learning_rate, eval_on_start=True,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, collate, parts["train"], parts["test"])
    report = filet.initialize_from_trainer(trainer, filet.FiletConfig(samples=args.samples))
    say = trainer.accelerator.print  # of one process
    say(f"{len(report.modules)} layers from {report.samples} images of {len(names)} classes")
    trainer.train()
    before, after = trainer.state.log_history[0], trainer.evaluate()
    say(f"held-out loss {before['eval_loss']:.4f}, then {after['eval_loss']:.4f}")
    if trainer.is_world_process_zero():
        filet.save_as_lora(trainer.model, args.output, report=report)


if __name__ == "__main__":
    main()
