"""Preferences by TRL's DPOTrainer, from FILet's directions: the reference is the base model.

    python examples/dpo_trl.py --model MODEL --data pairs.jsonl --output ADAPTER
    torchrun --nproc-per-node 2 examples/dpo_trl.py ...

A row of DATA has ``prompt``, ``chosen`` and ``rejected``. At step 0 the rewards are 0, and the loss
is ln 2 = 0.6931; to rounding with --start untouched, where a product is subtracted from itself.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import filet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    numbers = {"rank": 32, "samples": 320, "steps": 100, "batch-size": 4, "learning-rate": 5e-5}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--start", choices=("zero", "untouched"), default="zero")
    args = parser.parse_args(argv)
    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    parts = rows.train_test_split(test_size=0.1, seed=0)
    settings = DPOConfig(
        args.output, max_steps=args.steps, beta=0.1, eval_on_start=True, report_to="none",
        per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"),
        args=settings, train_dataset=parts["train"], eval_dataset=parts["test"],
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"),
    )  # fmt: skip
    config = filet.FiletConfig(start=args.start, samples=args.samples)
    report = filet.initialize_from_trainer(trainer, config)
    say = trainer.accelerator.print  # of one process
    say(f"{len(report.modules)} layers from {report.loss_terms} pairs")
    trainer.train()
    for step, seen in {0: trainer.state.log_history[0], args.steps: trainer.evaluate()}.items():
        rewards = (f"{side} {seen[f'eval_rewards/{side}']:.1e}" for side in ("chosen", "rejected"))
        say(f"step {step}: loss {seen['eval_loss']:.4f}, rewards:", *rewards)
    if trainer.is_world_process_zero():
        filet.save_as_lora(trainer.model, args.output, report=report)


if __name__ == "__main__":
    main()
