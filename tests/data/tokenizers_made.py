"""A tokenizer that merges letters, and templates as models have them."""

from __future__ import annotations

from typing import Any

CORPUS = (
    "What colour is the sky? It is blue, and the sun is yellow. Who are you? I am a cat.\n"
    "Tell me the weather in Paris. It rains. user assistant system tool hello there, hello."
).splitlines() * 4

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Every turn the same, whatever comes after it."""

MARKED = CHATML.replace(
    "{{ message['content'] + '<|im_end|>' }}{% else %}",
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}",
)
"""The same text, with the assistant's words marked as TRL's training templates do."""

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if 'tool_calls' in message %}{% for call in message['tool_calls'] %}"
    "{{ call['function'] | tojson }}{% endfor %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LAST_TURN_DIFFERS = CHATML.replace(
    "{% if message['role'] == 'assistant' %}{{ ",
    "{% if message['role'] == 'assistant' %}{{ ('<think></think>' if loop.last else '') + ",
)
"""As Qwen3's: the last answer is written in another way than one before it."""


def bpe(template: str | None = None, **special: str) -> Any:
    """A byte-level BPE of 400 ids, with the marks of ChatML; ``<|endoftext|>`` ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.add_special_tokens({"additional_special_tokens": marks[2:]})
    made.chat_template = template
    return made
