"""Fine-tunes one model from FILet, from PEFT's default LoRA and from PiSSA, and draws the losses.

Each method has a learning rate of its own. Everything else is the same: rank, alpha, target
modules, optimiser, and, for every seed, the batches. Writes loss.png and loss.csv and prints a
table of the loss on the task and on text that was not trained on, as what may be forgotten:

    python examples/finetune.py --model MODEL --adapter ADAPTER --data FOLDER

Differences are paired with LoRA's, seed by seed; the intervals are Student's of their mean, at 95%.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import t as student
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import filet
from filet.data.samples import AnySample, read_samples
from filet.data.sources import Source
from filet.data.tokens import batches

Batch = dict[str, torch.Tensor]
LoadBase = Callable[[], PreTrainedModel]
REFERENCE = "LoRA"
OTHERS: dict[str, Any] = {REFERENCE: True, "PiSSA": "pissa_niter_16"}  # PEFT's init_lora_weights
# The best of half-decades, tried by another program and in other batches (docs/demo.md).
RATES = {"FILet": 3.16e-3, "FILet, keep": 3.16e-3, "LoRA": 3.16e-3, "PiSSA": 3.16e-4}
COLORS = {"FILet": "#0b6e99", "FILet, keep": "#4ba387", "LoRA": "#8c8c8c", "PiSSA": "#d9822b"}


@dataclass
class Run:
    """The losses of one fine-tuning by step, in nats per token."""

    method: str
    rate: float
    seed: int
    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    general: dict[int, float] = field(default_factory=dict)
    seconds_per_step: float = math.nan


@dataclass(frozen=True)
class Texts:
    """What a model is measured on, and, of a seed, what it is trained on."""

    held_out: list[Batch]
    general: list[Batch]
    train: Callable[[int], list[Batch]]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, texts: list[Batch]) -> float:
    """Loss per predicted token, so that batches of any size and padding count by their tokens."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in texts:
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * predicted
        tokens += predicted
    return total / tokens


def finetune(run: Run, model: PeftModel, texts: Texts, evaluate_every: int) -> None:
    """One pass over the seed's batches with AdamW, the rate falling to 0. Fills in the run."""
    train = texts.train(run.seed)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=run.rate,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / len(train), len(train) - 1)
    spent = 0.0
    for step, batch in enumerate(train, start=1):
        start = time.perf_counter()
        model.train()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.train[step] = loss.item()
        spent += time.perf_counter() - start
        if step % evaluate_every == 0 or step == len(train):
            run.held_out[step] = mean_loss(model, texts.held_out)
    run.general[len(train)] = mean_loss(model, texts.general)
    run.seconds_per_step = spent / len(train)


def others(model: PeftModel) -> dict[str, LoraConfig]:
    """The configurations of what FILet is compared with: of the rank and scaling that it trains."""
    chosen = model.peft_config["default"]
    # Of what trains: PEFT's rank counts the frozen half of one that starts "untouched", too.
    rank = next(p for name, p in model.named_parameters() if ".lora_A." in name).shape[0]
    return {
        method: LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=chosen.lora_alpha * rank / chosen.r,
            target_modules=chosen.target_modules,
            init_lora_weights=init,
        )
        for method, init in OTHERS.items()
    }


def methods(
    load_base: LoadBase, adapters: Mapping[str, Path]
) -> dict[str, Callable[[], PeftModel]]:
    """How each method's model is made anew; the first adapter's configuration rules them all."""
    configs = others(filet.load(load_base(), next(iter(adapters.values()))))
    found: dict[str, Callable[[], PeftModel]] = {}
    for name, path in adapters.items():
        found[name] = partial(_loaded, load_base, path)
    for name, config in configs.items():
        found[name] = partial(_wrapped, load_base, config)
    return found


def _loaded(load_base: LoadBase, path: Path) -> PeftModel:
    return filet.load(load_base(), path)


def _wrapped(load_base: LoadBase, config: LoraConfig) -> PeftModel:
    return get_peft_model(load_base(), config)


@dataclass(frozen=True)
class Row:
    """A method at a rate over its seeds: means, and the paired differences to the reference."""

    method: str
    rate: float
    held_out: float
    general: float
    held_out_less: tuple[float, float]
    general_less: tuple[float, float]
    seconds_per_step: float


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's interval of it at 95%; NaN of fewer than two."""
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in differences) / (n - 1)
    return mean, float(student.ppf(0.975, n - 1)) * math.sqrt(variance / n)


def last(losses: dict[int, float]) -> float:
    return losses[max(losses)]


def rows(runs: Sequence[Run]) -> list[Row]:
    """One of every method and rate. The reference is the better of its rates."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.rate), []).append(run)

    def mean(group: list[Run], losses: str) -> float:
        return sum(last(getattr(run, losses)) for run in group) / len(group)

    reference = min(
        (group for (method, _), group in groups.items() if method == REFERENCE),
        key=lambda group: mean(group, "held_out"),
    )

    def less(group: list[Run], losses: str) -> tuple[float, float]:
        pairs = zip(group, reference, strict=True)
        return interval([last(getattr(a, losses)) - last(getattr(b, losses)) for a, b in pairs])

    return [
        Row(
            method,
            rate,
            mean(group, "held_out"),
            mean(group, "general"),
            less(group, "held_out"),
            less(group, "general"),
            sum(run.seconds_per_step for run in group) / len(group),
        )
        for (method, rate), group in groups.items()
    ]


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("train_loss", "held_out_loss", "general_loss")
        writer.writerow(["method", "learning_rate", "seed", "step", *names])
        for run in runs:
            for step in sorted(run.train.keys() | run.held_out.keys()):
                losses = (of.get(step) for of in (run.train, run.held_out, run.general))
                values = (x and f"{x:.6f}" for x in losses)
                writer.writerow([run.method, run.rate, run.seed, step, *values])


def print_table(found: Sequence[Row], before: tuple[float, float]) -> None:
    print(
        f"\n{'':12}{'rate':>8}  {'held out':9}{'less LoRA':18}{'general':9}{'less LoRA':18}s/step"
    )
    print(f"{'before':12}{'':8}  {before[0]:<9.4f}{'':18}{before[1]:<9.4f}")
    for row in found:
        less = [f"{m:+.4f} ± {half:.4f}" for m, half in (row.held_out_less, row.general_less)]
        print(
            f"{row.method:12}{row.rate:8.2g}  {row.held_out:<9.4f}{less[0]:18}"
            f"{row.general:<9.4f}{less[1]:18}{row.seconds_per_step:.2f}"
        )


def draw(path: Path, runs: Sequence[Run], found: Sequence[Row], title: str, settings: str) -> None:
    """Held-out loss by step on the left; on the right what is learned and kept, less LoRA's."""
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
        curves, learned, kept = figure.subplots(1, 3, width_ratios=(2, 1.2, 1.2))
        for row in found:
            of = [run.held_out for run in runs if (run.method, run.rate) == (row.method, row.rate)]
            means = [sum(losses[step] for losses in of) / len(of) for step in of[0]]
            curves.plot(
                list(of[0]), means, "o-", color=COLORS[row.method], lw=1.8, ms=4,
                label=f"{row.method}  {row.held_out:.3f}",
            )  # fmt: skip
        curves.set_title("Held-out loss, nats per token", loc="left", fontsize=11)
        curves.set_xlabel("step")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.legend(frameon=False, title="last value", alignment="left")
        _differences(learned, "Held out, less LoRA's", [(r.method, r.held_out_less) for r in found])
        _differences(kept, "Other text, less LoRA's", [(r.method, r.general_less) for r in found])
        kept.tick_params(labelleft=False)
        figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.915, settings, ha="left", color="#555555")
        figure.savefig(path, dpi=150)


def _differences(axes: Axes, title: str, of: Sequence[tuple[str, tuple[float, float]]]) -> None:
    for place, (method, (mean, half)) in enumerate(of):
        axes.errorbar(
            mean, -place, xerr=0 if math.isnan(half) else half,
            fmt="o", color=COLORS[method], capsize=3, ms=5,
        )  # fmt: skip
    axes.axvline(0, color="#666666", lw=1)
    axes.set_yticks([-place for place in range(len(of))], [method for method, _ in of])
    axes.margins(x=0.1, y=0.15)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("nats per token")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare FILet, LoRA and PiSSA on one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, required=True, help="what `filet init` wrote")
    parser.add_argument("--keep-adapter", type=Path, help="what `filet init --keep` wrote")
    parser.add_argument(
        "--data", type=Path, required=True, help="has python_train, python_test, general (.jsonl)"
    )
    parser.add_argument("--output", type=Path, help="where to write (default: the data folder)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", help="for all (default: one per method)")
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=16, help="samples to measure on, of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def read_texts(options: argparse.Namespace, device: str) -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def tokenize(chosen: list[AnySample], batch_size: int) -> list[Batch]:
        shape = {"max_length": options.max_length, "batch_size": batch_size}
        found = batches(chosen, tokenizer, by_length=False, **shape)  # shuffled: that order is kept
        return [{key: x.to(device) for key, x in batch.items()} for batch in found]

    def measured(name: str) -> list[Batch]:
        path = options.data / f"{name}.jsonl"
        return tokenize(read_samples(Source(path))[: options.held_out], 8)

    samples = read_samples(Source(options.data / "python_train.jsonl"))

    def train(seed: int) -> list[Batch]:
        chosen = random.Random(seed).sample(samples, options.steps * options.batch_size)
        return tokenize(chosen, options.batch_size)

    return Texts(measured("python_test"), measured("general"), train)


def main() -> None:
    options = parse_arguments()
    output = options.output or options.data
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_progress_bar()
    # PEFT asks transformers for a name that is to go; nothing here can change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    texts = read_texts(options, device)

    def load_base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)

    base = load_base()
    before = mean_loss(base, texts.held_out), mean_loss(base, texts.general)
    adapters = {"FILet": options.adapter}
    if options.keep_adapter:
        adapters["FILet, keep"] = options.keep_adapter
    runs: list[Run] = []
    for method, make in methods(load_base, adapters).items():
        for rate in options.rates or [RATES[method]]:
            for seed in options.seeds:
                torch.manual_seed(seed)  # of LoRA's random A
                run = Run(method, rate, seed, held_out={0: before[0]}, general={0: before[1]})
                finetune(run, make(), texts, options.evaluate_every)
                runs.append(run)
                print(
                    f"{method:12} rate {rate:.2g} seed {seed}  held out {last(run.held_out):.4f}  "
                    f"general {last(run.general):.4f}  {run.seconds_per_step:.2f} s per step",
                    flush=True,
                )
    write_csv(output / "loss.csv", runs)
    found = rows(runs)
    settings = (
        f"AdamW, a rate per method, {options.steps} steps of {options.batch_size}×"
        f"{options.max_length} tokens, {len(options.seeds)} seeds, 95% intervals, fp32 on {device}"
    )
    draw(output / "loss.png", runs, found, f"Fine-tuning {options.model.name}", settings)
    print(f"\n{settings}")
    print_table(found, before)
    print(f"\nLoss curves: {output / 'loss.png'}   values: {output / 'loss.csv'}")


if __name__ == "__main__":
    main()
