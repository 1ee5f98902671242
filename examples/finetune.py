"""Fine-tunes one model three times, from FILet, from PEFT's default LoRA and from PiSSA.

Everything else is the same: rank, alpha, target modules, seed, batches, optimiser, learning rate.
Draws the losses (loss.png), lists them (loss.csv) and prints a table:

    python examples/finetune.py --model MODEL --adapter ADAPTER --data FOLDER
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import filet
from filet.data.samples import Sample, read_samples
from filet.data.tokens import batches

Batch = dict[str, torch.Tensor]
COLORS = {"FILet": "#0b6e99", "LoRA": "#8c8c8c", "PiSSA": "#d9822b"}


@dataclass
class Run:
    """The losses of one fine-tuning, in nats per token."""

    method: str
    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds_per_step: float = math.nan

    @property
    def before(self) -> float:
        return self.held_out[0]

    @property
    def after(self) -> float:
        return self.held_out[max(self.held_out)]


@torch.no_grad()
def mean_loss(model: PeftModel, held_out: list[Batch]) -> float:
    """Loss per predicted token, so that batches of any size and padding count by their tokens."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in held_out:
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * predicted
        tokens += predicted
    return total / tokens


def finetune(
    method: str,
    model: PeftModel,
    train: list[Batch],
    held_out: list[Batch],
    learning_rate: float,
    evaluate_every: int,
) -> Run:
    """One pass over ``train`` with AdamW at a constant learning rate."""
    run = Run(method)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate,
        weight_decay=0.0,
    )
    run.held_out[0] = mean_loss(model, held_out)
    print(f"{method:6} step  0/{len(train)}  held-out loss {run.before:.4f}", flush=True)
    spent = 0.0
    for step, batch in enumerate(train, start=1):
        start = time.perf_counter()
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.train[step] = loss.item()
        spent += time.perf_counter() - start
        if step % evaluate_every == 0 or step == len(train):
            run.held_out[step] = mean_loss(model, held_out)
            print(
                f"{method:6} step {step:2}/{len(train)}  held-out loss {run.after:.4f}  "
                f"{spent / step:.2f} s per step",
                flush=True,
            )
    run.seconds_per_step = spent / len(train)
    return run


def methods(
    load_base: Callable[[], PreTrainedModel], adapter: Path
) -> Iterator[tuple[str, PeftModel]]:
    """The three starting points, one at a time; the first one's configuration rules all three."""
    model = filet.load(load_base(), adapter)
    chosen = model.peft_config["default"]
    # Of what trains: PEFT's rank counts the frozen half of one that starts "untouched", too.
    rank = next(p for name, p in model.named_parameters() if ".lora_A." in name).shape[0]
    yield "FILet", model
    del model
    for method, init in {"LoRA": True, "PiSSA": "pissa_niter_16"}.items():
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=chosen.lora_alpha * rank / chosen.r,
            target_modules=chosen.target_modules,
            init_lora_weights=init,
        )
        yield method, get_peft_model(load_base(), config)


def write_csv(path: Path, runs: list[Run]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "step", "train_loss", "held_out_loss"])
        for run in runs:
            for step in sorted(run.train.keys() | run.held_out.keys()):
                losses = (run.train.get(step), run.held_out.get(step))
                writer.writerow([run.method, step, *(x and f"{x:.6f}" for x in losses)])


def draw(path: Path, runs: list[Run], title: str, settings: str) -> None:
    """Training loss of every batch on the left, held-out loss on the right."""
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
    }
    with rc_context(style):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for run in runs:
            color = COLORS[run.method]
            for axis, losses in zip(axes, (run.train, run.held_out), strict=True):
                axis.plot(
                    list(losses), list(losses.values()), "o-", color=color, lw=1.8, ms=4,
                    label=f"{run.method}  {losses[max(losses)]:.3f}",
                )  # fmt: skip
        for axis, name in zip(axes, ("Training loss, per batch", "Held-out loss"), strict=True):
            axis.set_title(name, loc="left", fontsize=11)
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False, title="last value", alignment="left")
        axes[0].set_ylabel("nats per token")
        figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.915, settings, ha="left", color="#555555")
        figure.savefig(path, dpi=150)


def print_table(runs: list[Run], settings: str) -> None:
    print(f"\n{settings}")
    print(f"{'method':8}{'before':>10}{'after':>10}{'change':>10}{'s per step':>12}")
    for run in runs:
        print(
            f"{run.method:8}{run.before:10.4f}{run.after:10.4f}{run.after - run.before:+10.4f}"
            f"{run.seconds_per_step:12.2f}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare FILet, LoRA and PiSSA on one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, required=True, help="what `filet init` wrote")
    parser.add_argument("--data", type=Path, required=True, help="has train.jsonl, heldout.jsonl")
    parser.add_argument("--output", type=Path, help="where to write (default: the data folder)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--evaluate-every", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16, help="held-out samples to measure on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    output = options.output or options.data
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_progress_bar()
    # PEFT asks transformers for a name that is to go; nothing here can change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = read_samples(options.data / "train.jsonl")
    random.Random(options.seed).shuffle(samples)
    held_out_samples = read_samples(options.data / "heldout.jsonl", limit=options.held_out)

    def tokenize(chosen: list[Sample]) -> list[Batch]:
        shape = {"max_length": options.max_length, "batch_size": options.batch_size}
        found = batches(chosen, tokenizer, by_length=False, **shape)  # shuffled: that order is kept
        return [{key: x.to(device) for key, x in batch.items()} for batch in found]

    train = tokenize(samples[: options.steps * options.batch_size])
    held_out = tokenize(held_out_samples)

    def load_base() -> PreTrainedModel:
        torch.manual_seed(options.seed)
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)

    runs = []
    settings = ""
    for method, model in methods(load_base, options.adapter):
        rank, alpha = model.peft_config["default"].r, model.peft_config["default"].lora_alpha
        settings = (
            f"rank {rank}, alpha {alpha:g}, AdamW, learning rate {options.learning_rate:g}, "
            f"{len(train)} steps of {options.batch_size}×{options.max_length} tokens, "
            f"seed {options.seed}, fp32 on {device}"
        )
        runs.append(
            finetune(method, model, train, held_out, options.learning_rate, options.evaluate_every)
        )
    write_csv(output / "loss.csv", runs)
    draw(output / "loss.png", runs, f"Fine-tuning {options.model.name}", settings)
    print_table(runs, settings)
    print(f"\nLoss curves: {output / 'loss.png'}   values: {output / 'loss.csv'}")


if __name__ == "__main__":
    main()
