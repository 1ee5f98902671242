"""Supervised fine-tuning by TRL's SFTTrainer, from FILet's directions.

    python examples/sft_trl.py --model MODEL --data chats.jsonl --output ADAPTER
    torchrun --nproc-per-node 2 examples/sft_trl.py ...

A row of DATA has ``messages``, or ``prompt`` and ``completion``, or ``text``.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, get_training_chat_template

import filet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    numbers = {"rank": 32, "samples": 320, "steps": 100, "batch-size": 4, "learning-rate": 2e-4}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    answers = "messages" in rows.column_names
    try:
        _ = answers and get_training_chat_template(tokenizer)
    except (TypeError, ValueError):  # TRL cannot mark answers: the last of each is learned
        pairs = [{"prompt": each[:-1], "completion": each[-1:]} for each in rows["messages"]]
        rows, answers = datasets.Dataset.from_list(pairs), False
    parts = rows.train_test_split(test_size=0.1, seed=0)
    settings = SFTConfig(
        args.output, max_steps=args.steps, assistant_only_loss=answers,
        eval_on_start=True, report_to="none",
        per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"), settings,
        train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer,
        peft_config=LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"),
    )  # fmt: skip
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
