"""QLoRA from FILet's directions: a model in 4 bits, an adapter initialised on it, and trained.

    python examples/qlora.py --model MODEL --data train.jsonl --output ADAPTER

MODEL is a local folder with its tokenizer, DATA as ``filet init`` reads it. The adapter is for the
model as it is quantised here: plain PEFT loads it on the same base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

import filet
from filet.data.samples import read_samples
from filet.data.sources import Source
from filet.data.tokens import encode


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(argv)

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four_bits, dtype=dtype
    )
    base = prepare_model_for_kbit_training(base)
    lora = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    texts = encode(read_samples(Source(options.data)), tokenizer, max_length=512)
    filet.initialize_lora_filet_weights(model, texts.batches(4, by_length=True))

    settings = transformers.TrainingArguments(
        str(options.output / "checkpoints"), max_steps=options.steps, per_device_train_batch_size=1,
        learning_rate=1e-3, logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = [{key: value[0] for key, value in batch.items()} for batch in texts.batches(1)]
    transformers.Trainer(model, settings, train_dataset=rows).train()
    filet.save_as_lora(model, options.output)


if __name__ == "__main__":
    main()
