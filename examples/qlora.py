"""QLoRA by TRL's SFTTrainer, from FILet's directions: an adapter for a model in 4 bits.

    python examples/qlora.py --model MODEL --data chats.jsonl --output ADAPTER
    torchrun --nproc-per-node 2 examples/qlora.py ...

A row of DATA has ``prompt`` and ``completion``, or ``text``. The adapter is for the
model as it is quantised here: plain PEFT loads it on the same base.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import filet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    numbers = {"rank": 16, "samples": 320, "steps": 100, "batch-size": 4, "learning-rate": 2e-4}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    parts = rows.train_test_split(test_size=0.1, seed=0)
    settings = SFTConfig(
        args.output, max_steps=args.steps, eval_on_start=True, report_to="none",
        per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, quantization_config=four_bits, device_map={"": settings.device}
    )
    trainer = SFTTrainer(
        base, settings, train_dataset=parts["train"], eval_dataset=parts["test"],
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    report = filet.initialize_from_trainer(trainer, filet.FiletConfig(samples=args.samples))
    say = trainer.accelerator.print  # of one process
    say(f"{len(report.modules)} layers from {report.samples} samples, {report.loss_terms} tokens")
    trainer.train()
    before, after = trainer.state.log_history[0], trainer.evaluate()
    say(f"held-out loss {before['eval_loss']:.4f}, then {after['eval_loss']:.4f}")
    if trainer.is_world_process_zero():
        filet.save_as_lora(trainer.model, args.output)


if __name__ == "__main__":
    main()
