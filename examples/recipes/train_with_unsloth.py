"""unsloth trains an adapter that was initialised by FILet.

    filet init --model base --data train.jsonl --output adapter --rank 32
    python examples/recipes/train_with_unsloth.py

FastLanguageModel.from_pretrained reads the base's place in the adapter's folder, loads both, and
makes the adapter trainable. FastLanguageModel.get_peft_model is not called: there is an adapter.
"""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip  (first: it changes the others)
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

# In 4 bits: load_in_4bit=True, and filet init --quantize nf4 --double-quant --dtype bfloat16.
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="adapter",
    max_seq_length=2048,
    load_in_4bit=False,  # True is its default, whatever the adapter was made for
    use_exact_model_name=True,  # no other checkpoint for a base of a name that it knows
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    args=SFTConfig(
        output_dir="trained",
        assistant_only_loss=True,  # of rows with messages; leave it out for others
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
    ),
)
trainer.train()
model.save_pretrained("trained")
