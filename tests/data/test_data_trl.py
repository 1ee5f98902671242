"""The batches that TRL's SFTTrainer trains on, and the moments of its packed ones.

Where TRL is installed, 0.24 or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers_made import CHATML, CORPUS, MARKED, WITH_TOOLS, bpe
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import filet
from filet.data.samples import Chat, read_samples
from filet.data.sources import Source
from filet.data.tokens import encode
from made_data import write_jsonl

trl = pytest.importorskip("trl", minversion="0.24")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:dropped"),
]

ASKED = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
WHO = {"role": "user", "content": "Who are you?"}
CAT = {"role": "assistant", "content": "I am a cat."}
SYSTEM = {"role": "system", "content": "hello there"}
RAINS = {"role": "tool", "content": "It rains."}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Paris"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}


def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def trainer(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **options: Any) -> Any:
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, **options}
    return trl.SFTTrainer(
        model=model(tokenizer),
        args=trl.SFTConfig(output_dir=str(folder / "trained"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def samples(rows: list[dict[str, Any]], folder: Path) -> list[Any]:
    return read_samples(Source(write_jsonl(folder / "rows.jsonl", *rows)))


TEXTS = [{"text": text} for text in CORPUS[:2]] + [{"text": "I am"}]
PAIRS = [
    {"prompt": "What colour is the sky?", "completion": " It is blue."},
    {"prompt": "Who are you? I am", "completion": "a cat"},  # letters may merge across the border
    {"prompt": "Tell me the wea", "completion": "ther in Paris."},
]
CHAT_PAIRS = [
    {"prompt": [SYSTEM, ASKED], "completion": [BLUE]},
    {"prompt": [ASKED, BLUE, WHO], "completion": [CAT, ASKED, BLUE]},
]
CHATS = [{"messages": [ASKED, BLUE, WHO, CAT]}, {"messages": [SYSTEM, WHO, CAT]}]
CALLS = [{"messages": [ASKED, CALLED, RAINS, CAT], "tools": [TOOL]}]
IDS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
LABELLED = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [9, 10]},
]
MASKED = [
    {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 1, 0]},
    {"input_ids": [9, 10], "assistant_masks": [0, 1]},
]
SHAREGPT = [
    {"conversations": [{"from": t["role"], "value": t["content"]} for t in (ASKED, BLUE, WHO, CAT)]}
]

ALL = {"count_prompt": True}
ASSISTANT = {"assistant_only_loss": True}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("rows", "template", "ours", "theirs"),
    [
        (TEXTS, None, {}, {}),
        (PAIRS, None, {}, {}),
        (PAIRS, None, ALL, {"completion_only_loss": False}),
        (CHAT_PAIRS, CHATML, {}, {}),
        (CHAT_PAIRS, MARKED, {}, {}),
        (CHATS, MARKED, {}, ASSISTANT),
        (CHATS, CHATML, ALL, {}),
        (CALLS, WITH_TOOLS, ALL, {}),
        (SHAREGPT, MARKED, ALL, {}),
        (IDS, None, {}, {}),
        (LABELLED, None, {}, {}),
        (MASKED, None, {}, {}),
    ],
    ids=range(12),
)
def test_batches_are_those_of_the_trainer(
    rows: list[dict[str, Any]],
    template: str | None,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    cut: bool,
    tmp_path: Path,
) -> None:
    tokenizer = bpe(template)
    max_length = (9 if template is None else 30) if cut else 1024
    made = trainer(rows, tokenizer, tmp_path, max_length=max_length, **theirs)
    kept = [row for row in made.train_dataset if any(x != -100 for x in row["labels"][1:])]
    expected = made.data_collator(kept)
    encoded = encode(samples(rows, tmp_path), bpe(template), max_length=max_length, **ours)
    [found] = encoded.batches(len(encoded))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    "name", ["cohere", "gemma", "gemma3", "lfm2", "llama3", "qwen3_instruct_2507"]
)
def test_prefixes_find_what_the_training_templates_mark(name: str) -> None:
    """Of models' own templates, which TRL has with marks and without."""
    folder = Path(trl.__file__).parent / "chat_templates"
    plain, marked = (folder / f"{name}{kind}.jinja" for kind in ("", "_training"))
    if not plain.exists() or not marked.exists():
        pytest.skip("this release of TRL has no such templates")
    chat = Chat([ASKED, BLUE, WHO, CAT])
    found, expected = (
        encode([chat], bpe(path.read_text(), bos_token="<|endoftext|>"), max_length=999).rows
        for path in (plain, marked)
    )
    assert "generation" not in plain.read_text().replace("add_generation_prompt", "")
    assert found == expected
    ids, labels = found[0]
    counted = [i for i in labels if i != -100]
    assert "It is blue." in bpe().decode(counted) and len(counted) < len(ids)


def test_the_default_length_is_the_trainers() -> None:
    from filet.cli.arguments import make_parser

    args = make_parser().parse_args("init --model m --data d --output o".split())
    assert args.max_length == trl.SFTConfig.max_length


def moments(batches: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """Of every layer: the second moment of the inputs and of the gradients, in double precision."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    peft_model = get_peft_model(model(tokenizer).double(), config)
    settings = filet.FiletConfig(samples=None)
    statistics = filet.collect_statistics(
        peft_model, batches, config=settings, show_progress_bar=False
    )
    return {
        f"{name} {side}": getattr(layer, side).sum.tril()
        for name, layer in statistics.moments.items()
        for side in ("input", "output")
    }


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=["packed", "free"],
)
def test_packed_batches_have_the_moments_of_padded_ones(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The trainer's, without padding; every sample sees itself alone in both."""
    rows = [{"prompt": text[:9], "completion": text[9:]} for text in CORPUS[:2]] + PAIRS
    tokenizer = bpe()
    made = trainer(rows, tokenizer, tmp_path, **options, per_device_train_batch_size=8)
    packed = [dict(batch) for batch in made.get_train_dataloader()]
    assert all("position_ids" in batch and "attention_mask" not in batch for batch in packed)
    assert any(batch["position_ids"][0, 1:].eq(0).any() for batch in packed)
    padded = encode(samples(rows, tmp_path), bpe(), max_length=64).batches(2, by_length=True)
    found, expected = moments(packed, tokenizer), moments(padded, tokenizer)
    assert found.keys() == expected.keys() and len(found) == 28
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max())
        )
