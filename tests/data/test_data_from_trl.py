"""Initialisation from TRL's trainers, beside an independent run in float64.

Where TRL is installed, 1.16 or later: the batches of DPO were others before.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers_made import CORPUS, bpe
from torch import Tensor

import filet
import oracle
from filet import FiletConfig
from models import linears, llama, true_energies, weight_of, worst
from passes import FLOAT32
from ranks import run, values

trl = pytest.importorskip("trl", minversion="1.16")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BETA = 0.3
WORDS = " ".join(CORPUS[:2]).split()
ROWS = [
    {
        "prompt": " ".join(WORDS[n : n + 3]),
        "completion": " " + " ".join(WORDS[n + 2 : n + 4 + n % 3]),
        "chosen": " " + " ".join(WORDS[n + 1 : n + 3 + n % 2]),
        "rejected": " " + " ".join(WORDS[n + 5 : n + 6 + n % 4]),
    }
    for n in range(7)
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells nobody of a run in CI; processes find each other by connections."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def tokenizer() -> Any:
    return bpe()


def base(tokenizer: Any, **config: Any) -> Any:
    """Its attention drops half of what it has, in training alone."""
    config |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return llama(max_position_embeddings=128, **config)


def lora(model: Any, **more: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=linears(model, "lm_head"), **more)


def made(
    kind: str, columns: tuple[str, ...], tokenizer: Any, folder: Path, model: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    """A trainer of TRL on a tiny Llama, which gets its adapter by peft_config unless it has one."""
    model = base(tokenizer) if model is None else model
    settings = {
        "per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in ROWS]),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora(model),
    )


def energies(report: filet.FiletReport) -> dict[str, Tensor]:
    return {name: module.energies for name, module in report.modules.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(checkpointing: bool, tokenizer: Any, tmp_path: Path) -> None:
    """The loss on completions, of the rows as they were tokenised, each alone."""
    columns = ("prompt", "completion")
    trainer = made("SFT", columns, tokenizer, tmp_path, gradient_checkpointing=checkpointing)
    samples = []
    for row in trainer.train_dataset:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        samples.append({"input_ids": ids, "labels": labels})
    plain = base(tokenizer)
    expected = true_energies(plain, linears(plain, "lm_head"), samples, shift=True)
    metrics = copy.deepcopy(trainer._metrics)
    report = filet.initialize_from_trainer(trainer)
    assert report.samples == len(ROWS)
    assert report.loss_terms == sum(int((s["labels"][1:] != -100).sum()) for s in samples)
    error, name = worst(energies(report), expected)
    assert error < FLOAT32, name
    assert trainer._metrics == metrics and trainer._total_train_tokens == 0
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion])
    words = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return words[len(prompt) - 1 :].sum()


def dpo_truth(model: Any, rows: Any, names: list[str]) -> dict[str, Tensor]:
    """−log σ(β (Δ − Δref)) summed over pairs, Δ = log p(chosen) − log p(rejected), in float64."""
    model = copy.deepcopy(model).double().eval()
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            seen[name][0].append(args[0].detach()[0])
            output.register_hook(lambda g: seen[name][1].append(g.detach()[0]))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    for row in rows:
        delta = log_probability(model, row["prompt_ids"], row["chosen_ids"])
        delta = delta - log_probability(model, row["prompt_ids"], row["rejected_ids"])
        # The reference is the model itself, as long as B is 0.
        (-F.logsigmoid(BETA * (delta - delta.detach()))).backward()
    return {
        name: oracle.fisher_energies(weight_of(model, name), torch.cat(x), torch.cat(g) / len(rows))
        for name, (x, g) in seen.items()
    }


def adapted(model: Any, **more: Any) -> Any:
    return get_peft_model(model, lora(model, **more))


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["peft_config", "PeftModel"])
def test_dpo(given: bool, precomputed: bool, tokenizer: Any, tmp_path: Path) -> None:
    """The reference runs through the same layers, and is not counted."""
    # TRL computes it in advance as the model is in training, with dropout.
    model = base(tokenizer, attention_dropout=0.0 if precomputed else 0.5)
    trainer = made(
        "DPO", ("prompt", "chosen", "rejected"), tokenizer, tmp_path,
        adapted(model) if given else model,
        beta=BETA, precompute_ref_log_probs=precomputed, gradient_checkpointing=not precomputed,
    )  # fmt: skip
    assert ("ref" in trainer.model.peft_config) == given
    plain = base(tokenizer)
    expected = dpo_truth(plain, trainer.train_dataset, linears(plain, "lm_head"))
    active = trainer.model.active_adapter
    report = filet.initialize_from_trainer(trainer)
    error, name = worst(energies(report), expected)
    assert error < FLOAT32, name
    assert report.samples == 2 * len(ROWS) and report.loss_terms == len(ROWS)
    assert trainer.model.active_adapter == active
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(trainer.model.named_parameters()) if ".default." in n}
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model.eval(), batch))
    assert loss == pytest.approx(math.log(2), abs=1e-6)  # no divergence from the reference
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1


def rewards_at_first(trainer: Any) -> list[float]:
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.compute_loss(trainer.model.eval(), batch)
    return [trainer._metrics["eval"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]


@pytest.mark.parametrize(
    ("given", "precomputed"),
    [
        ("peft_config", False), ("peft_config", True), ("PeftModel", False),
        ("initialised", False), ("initialised", True), ("trained", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_the_reference_of_pairs_is_the_start(
    start: Any, given: str, precomputed: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """The log-probabilities are equal to the bit.

    To rounding, where B A − B0 A0 is a sum of products or the reference ran in other batches. A
    reference that was trained is far from any new start, so that is refused; for the adapter that
    it is a copy of it is right.
    """
    model = base(tokenizer, attention_dropout=0.0)
    if given != "peft_config":
        model = adapted(model)
    if given in ("initialised", "trained"):
        initialise(model, FiletConfig(start=start))
    if given == "trained":
        nudge(model)
    columns = ("prompt", "chosen", "rejected")
    more = {"beta": BETA, "precompute_ref_log_probs": precomputed}
    trainer = made("DPO", columns, tokenizer, tmp_path, model, **more)
    if given in ("initialised", "trained"):
        assert max(map(abs, rewards_at_first(trainer))) <= (1e-6 if precomputed else 0)
    if given == "trained":
        with pytest.raises(ValueError, match="'ref', is a copy of one that was trained"):
            filet.initialize_from_trainer(trainer)
        return
    filet.initialize_from_trainer(trainer, FiletConfig(start=start))
    exact = start == "zero" and given != "initialised" and not precomputed
    assert max(map(abs, rewards_at_first(trainer))) <= (0 if exact else 1e-6)


def initialise(model: Any, config: FiletConfig) -> None:
    ids = torch.arange(4, 12)[None]
    batch = {"input_ids": ids, "labels": ids}
    filet.initialize_lora_filet_weights(model, [batch], config, show_progress_bar=False)


def nudge(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("samples", [4, 9, None])
def test_dpo_cuts_no_pair(samples: int | None, tokenizer: Any, tmp_path: Path) -> None:
    """In the order of the data; of nine sequences four pairs are made, the last batch's first."""
    columns = ("prompt", "chosen", "rejected")
    trainer = made("DPO", columns, tokenizer, tmp_path, beta=BETA)
    sampler = torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer._get_train_sampler = lambda *_: sampler
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=samples))
    plain = base(tokenizer)
    pairs = len(ROWS) if samples is None else samples // 2
    rows = trainer.train_dataset.select(range(pairs))
    expected = dpo_truth(plain, rows, linears(plain, "lm_head"))
    assert report.loss_terms == pairs and report.samples == 2 * pairs
    assert worst(energies(report), expected)[0] < FLOAT32


def test_a_trained_head_keeps_its_gradient(tokenizer: Any, tmp_path: Path) -> None:
    """Switching the adapters off and on thaws it; the pass has it frozen all the same."""
    columns = ("prompt", "chosen", "rejected")
    model = adapted(base(tokenizer), modules_to_save=["lm_head"])
    trainer = made("DPO", columns, tokenizer, tmp_path, model, beta=BETA)
    filet.initialize_from_trainer(trainer)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_other_batches_of_pairs_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    columns = ("prompt", "chosen", "rejected")
    trainer = made("DPO", columns, tokenizer, tmp_path)
    trainer.data_collator = lambda rows: {"chosen_input_ids": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="a batch of pairs has chosen_input_ids; expected input_"):
        filet.initialize_from_trainer(trainer)


def on_rank(rank: int, folder: Path, samples: int | None) -> Any:
    os.environ["CI"] = "1"
    trainer = made("DPO", ("prompt", "chosen", "rejected"), bpe(), folder, beta=BETA)
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=samples))
    return energies(report), (report.samples, report.loss_terms), list(trainer.train_dataset)


@pytest.mark.parametrize(("samples", "pairs"), [(None, 7), (11, 4)])
def test_dpo_in_two_processes(
    samples: int | None, pairs: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Every pair once, though accelerate repeats one to even them out; no half pair."""
    (first, counts, rows), (second, *_) = values(run(2, on_rank, tmp_path, samples))
    assert counts == (2 * pairs, pairs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if samples is None:
        plain = base(tokenizer)
        expected = dpo_truth(plain, rows, linears(plain, "lm_head"))
        assert worst(first, expected)[0] < FLOAT32
