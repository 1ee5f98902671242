"""QLoRA by TRL's SFTTrainer, from FILet's directions: an adapter for a model in 4 bits.

    python examples/qlora.py --model MODEL --data chats.jsonl --output ADAPTER
    torchrun --nproc-per-node 2 examples/qlora.py ...

A row of DATA has ``messages``, or ``prompt`` and ``completion``, or ``text``.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
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
    rows = datasets.load_dataset("json", data_files=args.data, split="train").shuffle(seed=0)
    if "messages" in rows.column_names:  # a row of each answer, which no chat template has to mark
        at = [(m, i) for m in rows["messages"] for i, t in enumerate(m) if t["role"] == "assistant"]
        rows = datasets.Dataset.from_list([{"prompt": m[:i], "completion": [m[i]]} for m, i in at])
    parts = rows.train_test_split(test_size=0.1, shuffle=False)
    dtype = torch.bfloat16 if (gpu := torch.cuda.is_available()) else torch.float32
    settings = SFTConfig(
        args.output, max_steps=args.steps, eval_on_start=True, report_to="none",
        per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        bf16=gpu, use_cpu=not gpu, save_strategy="no",
    )  # fmt: skip
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    base = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map={"": settings.device},
        quantization_config=BitsAndBytesConfig(**nf4),
    )  # fmt: skip
    trainer = SFTTrainer(
        base, settings, train_dataset=parts["train"], eval_dataset=parts["test"],
        peft_config=LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear"),
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
