"""T5, BART and their kind by transformers' Seq2SeqTrainer, from FILet's directions.

    python examples/seq2seq.py --model MODEL --data pairs.jsonl --output ADAPTER
    torchrun --nproc-per-node 2 examples/seq2seq.py ...

A row of DATA has ``prompt`` and ``completion``, texts.
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
    numbers = {"rank": 32, "samples": 320, "steps": 100, "batch-size": 8, "learning-rate": 1e-3}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def tokenize(row: dict[str, str]) -> Any:
        return tokenizer(
            row["prompt"], text_target=row["completion"], truncation=True, max_length=512
        )

    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    parts = rows.map(tokenize, remove_columns=rows.column_names).train_test_split(0.1, seed=0)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
    model = get_peft_model(model, lora)
    settings = transformers.Seq2SeqTrainingArguments(
        args.output, max_steps=args.steps, eval_on_start=True, report_to="none",
        per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model)
    trainer = transformers.Seq2SeqTrainer(model, settings, collate, parts["train"], parts["test"])
    report = filet.initialize_from_trainer(trainer, filet.FiletConfig(samples=args.samples))
    say = trainer.accelerator.print  # of one process
    say(f"{len(report.modules)} layers from {report.samples} samples, {report.loss_terms} tokens")
    trainer.train()
    before, after = trainer.state.log_history[0], trainer.evaluate()
    say(f"held-out loss {before['eval_loss']:.4f}, then {after['eval_loss']:.4f}")
    if trainer.is_world_process_zero():
        filet.save_as_lora(trainer.model, args.output, report=report)


if __name__ == "__main__":
    main()
