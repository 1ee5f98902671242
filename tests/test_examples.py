"""The examples on tiny models, by their command lines: what they print, and what they save."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from tokenizers_made import CHATML, CORPUS, MARKED, bpe
from torch import Tensor
from transformers import BitsAndBytesConfig

import filet
from models import case, llama, randomised
from ranks import run, values

pytest.importorskip("trl", minversion="1.16")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("sft_trl", "dpo_trl", "grpo_trl", "qlora", "vision", "seq2seq")
WORDS = " ".join(CORPUS[:2]).split()
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of the examples' models
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)

Done = tuple[str, Any]
"""What an example printed, and the model that it saved the adapter of."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL tells nobody of a run there


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with what reads their data, and the data, each kind of them learnt in a few steps."""
    place = tmp_path_factory.mktemp("examples")
    for name, template in (("chatml", CHATML), ("marked", MARKED)):
        tokenizer = bpe(template)
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = llama(max_position_embeddings=128, attention_dropout=0.0, **ids)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in ("t5", "bart"):
        config = case(name).model.config.to_dict() | ids | {"max_position_embeddings": 64}
        config |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config |= {key: 0.0 for key in config if "drop" in key}
        kind: Any = type(case(name).model)
        randomised(kind(kind.config_class(**config))).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in ("vit", "dinov2"):
        case(name).model.base_model.save_pretrained(place / name)
        size = {"height": 8, "width": 8}
        transformers.ViTImageProcessor(size=size).save_pretrained(place / name)
    write_texts(place)
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog", "owl")):
        (place / "images" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 80, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(place / "images" / name / f"{index}.png")
    return place


def write_texts(place: Path) -> None:
    rows: dict[str, list[Any]] = {"chats": [], "pairs": [], "preferences": []}
    for n in (*range(12), *range(12)):
        a, b, c = (" ".join(WORDS[n + k : n + k + 3]) for k in (0, 2, 5))
        turns = [{"role": role, "content": a} for role in ("user", "assistant")]
        turns += [{"role": "user", "content": b}, {"role": "assistant", "content": c}]
        rows["chats"].append({"messages": turns})
        rows["pairs"].append({"prompt": a, "completion": f" {b}"})
        rows["preferences"].append({"prompt": a, "chosen": f" {b}", "rejected": f" {c}"})
    for name, lines in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def arguments(place: Path, model: str, data: str, output: Path, *more: str) -> list[str]:
    paths = {"model": place / model, "data": place / data, "output": output}
    numbers = {"rank": 4, "steps": 6, "learning-rate": 2e-2}
    return [f"--{name}={value}" for name, value in (paths | numbers).items()] + list(more)


@pytest.fixture
def example(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """``example(name, model, data, *more)`` runs one, and saves into ``tmp_path``."""

    def main(name: str, model: str, data: str, *more: str) -> Done:
        saved = []
        save = filet.save_as_lora

        def save_as_lora(model: Any, *more: Any, **report: Any) -> None:
            saved.append(model)
            save(model, *more, **report)

        monkeypatch.setattr(filet, "save_as_lora", save_as_lora)
        importlib.import_module(name).main(arguments(place, model, data, tmp_path, *more))
        (trained,) = saved
        return capsys.readouterr().out, trained

    return main


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_knows_public_names_alone(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.count("\n") < 60
    assert set(re.findall(r"^(?:import|from) (filet\S*)", text, re.MULTILINE)) == {"filet"}
    assert set(re.findall(r"\bfilet\.(\w+)", text)) <= set(filet.__all__)
    assert f"examples/{name}.py --model" in text


def held_out(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"held-out loss (\S+), then (\S+)", printed)[0]]


def assert_loads(trained: Any, base: Any, folder: Path, batch: dict[str, Tensor]) -> None:
    """Plain PEFT makes of the folder what was trained, which is no longer what it started from."""
    loaded = PeftModel.from_pretrained(base, folder).eval()
    trained.eval().set_adapter("default")
    for name, parameter in loaded.named_parameters():
        parameter.data = parameter.data.to(trained.get_parameter(name))  # TRL's QLoRA is bfloat16
    gpu = trained.device.type == "cuda"  # where the trainer's autocast stays on
    batch = {key: value.to(trained.device) for key, value in batch.items()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
        expected, found = trained(**batch).logits.float(), loaded(**batch).logits.float()
        with trained.disable_adapter():
            start = trained(**batch).logits.float()
    learned = (expected - start).abs().max()
    assert learned > 1e-2
    # Under autocast B A is rounded to bfloat16, and B A - B0 A0 otherwise than as one product.
    atol = float(learned) / 10 if gpu else 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def causal(place: Path, name: str, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place / name, **more)


IDS = {"input_ids": torch.arange(5, 17)[None]}


@pytest.mark.parametrize("model", ["marked", "chatml"])
def test_sft(model: str, example: Any, place: Path, tmp_path: Path) -> None:
    """Of a template with marks all answers are predicted, else the last of each conversation."""
    printed, trained = example("sft_trl", model, "chats.jsonl")
    before, after = held_out(printed)
    assert after < before - 0.3
    layers, samples, tokens = re.findall(r"(\d+) layers from (\d+) samples, (\d+)", printed)[0]
    assert (int(layers), int(samples)) == (14, 21)
    each = {"marked": 2, "chatml": 1}[model]
    assert 21 * each * 5 < int(tokens) < 21 * each * 13  # three words in a few letters, and its end
    assert_loads(trained, causal(place, model), tmp_path, IDS)


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_dpo(start: str, example: Any, place: Path, tmp_path: Path) -> None:
    """The first rewards are β times differences of the policy and the base without adapters.

    They are 0 where B is. With a frozen half, B A − B0 A0 is a sum of 2r products in float32.
    """
    printed, trained = example("dpo_trl", "chatml", "preferences.jsonl", f"--start={start}")
    number = r"(\S+)"
    line = rf"step (\d): loss {number}, rewards: chosen {number} rejected {number}"
    first, last = ([float(n) for n in found] for found in re.findall(line, printed))
    assert first[:2] == [0, 0.6931] and last[0] == 6
    assert all(abs(reward) <= (0 if start == "zero" else 1e-6) for reward in first[2:])
    assert last[1] < 0.68 and last[2] > last[3]
    assert_loads(trained, causal(place, "chatml"), tmp_path, IDS)
    assert (tmp_path / "filet.json").exists() == (start == "untouched")


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_grpo(start: str, example: Any, place: Path, tmp_path: Path) -> None:
    """Policy and reference are two adapters of the same numbers: the KL is 0, to the bit."""
    printed, trained = example(
        "grpo_trl", "chatml", "pairs.jsonl", f"--start={start}", "--tokens=8"
    )
    first, last = (float(kl) for kl in re.findall(r"KL (\S+) and", printed))
    assert first == 0 and last > 1e-3
    assert "ref" in trained.peft_config
    assert_loads(trained, causal(place, "chatml"), tmp_path, IDS)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "ref").exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("data", ["pairs.jsonl", "chats.jsonl"])
def test_qlora(data: str, example: Any, place: Path, tmp_path: Path) -> None:
    """Of conversations, by a template without marks, every answer is a row."""
    printed, trained = example("qlora", "chatml", data)
    before, after = held_out(printed)
    assert after < before - 0.3
    samples = int(re.findall(r"from (\d+) samples", printed)[0])
    assert samples == {"pairs.jsonl": 21, "chats.jsonl": 43}[data]
    # Quantised from another dtype the codes are others.
    base = causal(place, "chatml", dtype=DTYPE, quantization_config=NF4)
    assert_loads(trained, base, tmp_path, IDS)


@pytest.mark.parametrize("model", ["vit", "dinov2"])
def test_vision(model: str, example: Any, place: Path, tmp_path: Path) -> None:
    """The head is new, and saved: a base with another head gives the same."""
    printed, trained = example("vision", model, "images")
    before, after = held_out(printed)
    assert after < before - 0.1
    assert "from 27 images of 3 classes" in printed
    torch.manual_seed(1)
    kind = transformers.AutoModelForImageClassification
    base = kind.from_pretrained(place / model, num_labels=3)
    pixels = torch.randn(2, 3, 8, 8)
    assert_loads(trained, base, tmp_path, {"pixel_values": pixels})


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_seq2seq(model: str, example: Any, place: Path, tmp_path: Path) -> None:
    printed, trained = example("seq2seq", model, "pairs.jsonl")
    before, after = held_out(printed)
    assert after < before - 0.1
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(place / model)
    assert_loads(trained, base, tmp_path, IDS | {"decoder_input_ids": IDS["input_ids"]})


def on_rank(rank: int, folder: Path, commands: dict[str, list[str]]) -> Any:
    os.environ["CI"] = "1"
    found = []
    initialize = filet.initialize_from_trainer

    def watched(trainer: Any, config: Any) -> Any:
        report = initialize(trainer, config)
        found.append((report.samples, trainer.model))
        return report

    filet.initialize_from_trainer = watched
    for name, argv in commands.items():
        importlib.import_module(name).main(argv)
    trained = (
        {n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for _, m in found
    )
    return dict(zip(commands, trained, strict=True)), [samples for samples, _ in found]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, each would take a GPU of its own")
def test_two_processes(place: Path, tmp_path: Path) -> None:
    """One adapter from the samples of both, trained in step, and the first one saves it."""
    more: dict[str, Any] = {"sft_trl": {}, "qlora": {"quantization_config": NF4}}
    if find_spec("bitsandbytes") is None:
        del more["qlora"]
    commands = {n: arguments(place, "chatml", "pairs.jsonl", tmp_path / n) for n in more}
    (first, samples), (second, _) = values(run(2, on_rank, tmp_path, commands))
    assert samples == [21] * len(more)
    for name, weights in first.items():
        assert weights and all(torch.equal(second[name][n], value) for n, value in weights.items())
        loaded = PeftModel.from_pretrained(causal(place, "chatml", **more[name]), tmp_path / name)
        saved = dict(loaded.named_parameters())
        assert all(torch.equal(saved[n], value.float()) for n, value in weights.items())
