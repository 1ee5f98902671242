"""Rewards by TRL's GRPOTrainer, from FILet's directions: the reference is where it starts.

    python examples/grpo_trl.py --model MODEL --data answers.jsonl --output ADAPTER

A row of DATA has ``prompt`` and ``completion``. GRPO has no loss before it has generated, so an
SFTTrainer initialises the adapter. GRPOTrainer copies it for its reference: at first the KL is 0.
"""

import argparse
from difflib import SequenceMatcher

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import filet


def likeness(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [SequenceMatcher(None, *both).ratio() for both in zip(completions, answer, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    numbers = {"rank": 32, "samples": 320, "steps": 100, "tokens": 64, "learning-rate": 1e-5}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--start", choices=("zero", "untouched"), default="zero")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    common = {"bf16": gpu, "use_cpu": not gpu, "save_strategy": "no", "report_to": "none"}
    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    data = {"train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(args.model)}
    sft = SFTTrainer(model, SFTConfig(args.output, **common), peft_config=lora, **data)
    config = filet.FiletConfig(start=args.start, samples=args.samples)
    report = filet.initialize_from_trainer(sft, config)
    say = sft.accelerator.print  # of one process
    say(f"{len(report.modules)} layers from {report.samples} samples, {report.loss_terms} tokens")
    settings = GRPOConfig(
        args.output, max_steps=args.steps, learning_rate=args.learning_rate, beta=0.04,
        num_generations=8, max_completion_length=args.tokens, logging_steps=1, **common,
    )  # fmt: skip
    data["train_dataset"] = rows.rename_column("completion", "answer")
    trainer = GRPOTrainer(sft.model, likeness, settings, **data)
    trainer.train()
    for logs in (trainer.state.log_history[0], trainer.state.log_history[args.steps - 1]):
        say("KL {kl:.1e} and reward {reward:.3f} before step {step}".format(**logs))
    if trainer.is_world_process_zero():
        filet.save_as_lora(trainer.model, args.output)


if __name__ == "__main__":
    main()
