"""The paper's Figure 4 anew: what each initialisation costs on top of LoRA's default.

    make bench-methods

Models of real shapes with random weights (bfloat16), adapters of rank 32 on all seven linear
layers, 320 samples of 512 random tokens. PEFT's own code where PEFT has the method, otherwise the
published recipe (recipes.py). Extra seconds: of the whole initialisation, a forward and backward of
the data included where the method needs them, less ``get_peft_model`` with PEFT's default.

Methods that treat layer by layer are measured on some of the blocks, those that read data on some
of the samples, where the whole would take minutes, and scaled; every row says on how many. Block
models have neither the head nor its loss: a forward that EVA and CorDA run for its activations does
without. Everything is warmed up on a tiny model first, FILet on the model itself. All in one run,
on one machine; a method that fails or takes too long has its reason in the table.
Written: methods.csv and methods.png in --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from peft import EvaConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, KasaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import filet
import shapes
from bench_model import bare, paper_blocks, timed
from bench_syrk import write
from recipes import AsWritten, dash_directions, filet_as_written, milora
from shapes import CUDA, SAMPLES, SHAPES, Shape, lora_config

WARM = 2  # batches of FILet's own warm-up
EVA_STEPS = 3
CORDA_SAMPLES = 32
MORE_BLOCKS = 4  # times --blocks-measured, for methods that take milliseconds a layer
REPEATS = 3  # of those


@dataclass(frozen=True)
class Result:
    """Seconds on top of LoRA's default, for the whole model, and what was measured for it."""

    seconds: float
    blocks: int  # measured
    samples: int = 0  # measured; 0: the method reads no data
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A model's shape and the settings that all methods share."""

    shape: Shape
    samples: int
    length: int
    batch_size: int
    rank: int
    blocks_measured: int
    batches_measured: int

    @cached_property
    def model(self) -> nn.Module:
        return shapes.build(self.shape, self.shape.blocks)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        return shapes.token_batches(self.shape, self.samples, self.length, self.batch_size)

    @property
    def part(self) -> list[dict[str, Tensor]]:
        return self.batches[: self.batches_measured]

    def blocks(self, times: int = 1) -> int:
        return min(self.blocks_measured * times, self.shape.blocks)

    def block_model(self, blocks: int) -> nn.Module:
        """Some blocks with a small vocabulary, never touched before."""
        return shapes.build(dataclasses.replace(self.shape, vocabulary=256, tied=False), blocks)

    def block_batches(self, samples: int, batch_size: int) -> list[dict[str, Tensor]]:
        small = dataclasses.replace(self.shape, vocabulary=256)
        batches = shapes.token_batches(small, samples, self.length, batch_size)
        return [shapes.on_device(batch) for batch in batches]

    def scaled(self, seconds: float, blocks: int) -> float:
        return seconds * self.shape.blocks / blocks


def default_seconds(model: nn.Module, rank: int) -> float:
    """What PEFT's default initialisation takes, which every method's time is on top of."""
    other = shapes.twin(model)
    return timed(lambda: get_peft_model(other, lora_config(rank)))[0]


# The methods. Those that run on the whole model share its weights, which some of them change.


def filet_ours(case: Case) -> Result:
    config = filet.FiletConfig(samples=None)

    def initialize(batches: Sequence[dict[str, Tensor]]) -> tuple[float, Any]:
        peft_model = shapes.with_lora(case.model, case.rank)
        seconds, _, report = timed(
            lambda: filet.initialize_lora_filet_weights(
                peft_model, batches, config, show_progress_bar=False
            )
        )
        return seconds, report

    initialize(case.batches[:WARM])
    seconds, report = initialize(case.batches)
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in report.seconds.items())
    return Result(seconds, case.shape.blocks, case.samples, parts)


def filet_paper(case: Case) -> Result:
    model, batches = case.model, case.part
    _, peak, _ = timed(lambda: bare(model, batches[:1]))
    blocks = min(paper_blocks(case.shape, case.shape.blocks, peak), case.blocks(MORE_BLOCKS))
    layers = shapes.linears(model, blocks)
    without = timed(lambda: bare(model, batches))[0]
    hooks = AsWritten(layers)
    with_hooks = timed(lambda: bare(model, batches))[0]
    hooks.remove()
    tokens = len(batches) * case.batch_size * case.length

    def select() -> None:
        for name, module in layers.items():
            S_X, S_Y = (total.div_(tokens) for total in hooks.sums.pop(name))
            weight = module.weight.data
            module.weight.data = filet_as_written(weight, S_X, S_Y, case.rank, 1.0)[2]

    selection = case.scaled(timed(select)[0], blocks)
    whole = without + case.scaled(with_hooks - without, blocks)
    whole *= len(case.batches) / len(batches)
    size = 4 * sum(s**2 for mn in case.shape.linears().values() for s in mn) * case.shape.blocks
    note = f"statistics {whole:.2f} s, selection {selection:.2f} s; {size / 1e9:.1f} GB in all"
    return Result(whole + selection, blocks, len(batches) * case.batch_size, note)


def lora_ga(case: Case) -> Result:
    """PEFT's: gradients of the weights over the data, then the SVD of each."""
    model = shapes.twin(case.model)
    config = lora_config(case.rank, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def gradients(batches: Sequence[dict[str, Tensor]]) -> None:
        def train_step() -> None:
            for batch in batches:
                model(**shapes.on_device(batch)).loss.backward()

        preprocess_loraga(model, config, train_step)

    try:
        gradients(case.part[:1])
        for module in shapes.linears(model, case.shape.blocks).values():
            del module._peft_loraga_grad  # as large as the weights
        reading = timed(lambda: gradients(case.part))[0]
        initialization = timed(lambda: get_peft_model(model, config))[0]
    finally:  # the parameters are the other models' too
        for parameter in case.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    reading *= len(case.batches) / len(case.part)
    extra = initialization - default_seconds(case.model, case.rank)
    note = f"gradients {reading:.2f} s, their SVD {extra:.2f} s"
    samples = len(case.part) * case.batch_size
    return Result(reading + extra, case.shape.blocks, samples, note)


def of_weights(times: int, repeats: int, **settings: Any) -> Callable[[Case], Result]:
    """A method of PEFT that looks at the weights alone."""

    def method(case: Case) -> Result:
        blocks = case.blocks(times)
        extra = []
        for _ in range(repeats):
            model = case.block_model(blocks)
            default = default_seconds(model, case.rank)
            config = lora_config(case.rank, **settings)
            extra.append(timed(lambda: get_peft_model(model, config))[0] - default)  # noqa: B023
        return Result(case.scaled(statistics.median(extra), blocks), blocks)

    return method


def milora_recipe(case: Case) -> Result:
    blocks = case.blocks()
    layers = shapes.linears(case.block_model(blocks), blocks)

    def initialize() -> None:
        for module in layers.values():
            module.weight.data = milora(module.weight.data, case.rank, 1.0)[2]

    return Result(case.scaled(timed(initialize)[0], blocks), blocks)


def dash_recipe(case: Case) -> Result:
    """Without the 100 steps before, which are training that LoRA does as well."""
    blocks = case.blocks()
    layers = shapes.linears(case.block_model(blocks), blocks)
    deltas = {
        name: torch.randn(m.out_features, case.rank, device=m.weight.device)
        @ torch.randn(case.rank, m.in_features, device=m.weight.device)
        for name, m in layers.items()
    }

    def choose() -> None:
        for name, module in layers.items():
            dash_directions(module.weight.data, deltas[name])

    return Result(case.scaled(timed(choose)[0], blocks), blocks)


class _EnoughSteps(Exception):
    """Ends PEFT's loop, which otherwise goes on until every layer has converged."""


def eva(case: Case) -> Result:
    """PEFT's: its comparison of inputs, then incremental SVD steps, one a batch.

    Steps are scaled to one reading of all samples; whether the components have converged by then
    is not looked at. rho is 1: no ranks are redistributed, which costs least.
    """
    blocks = case.blocks()
    batches = case.block_batches(case.samples, case.batch_size)
    config = lora_config(case.rank, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    peft_model = get_peft_model(case.block_model(blocks), config)
    calls: list[float] = []

    def forward(model: Any, batch: Any) -> None:
        shapes.synchronize()
        calls.append(time.perf_counter())
        if len(calls) > 1 + EVA_STEPS:
            raise _EnoughSteps
        model.base_model.model.model(input_ids=batch["input_ids"])

    def initialize() -> None:
        try:
            initialize_lora_eva_weights(
                peft_model, batches, forward_fn=forward, show_progress_bar=False
            )
        except _EnoughSteps:
            return

    timed(initialize)
    steps = len(calls) - 2  # the first call compares inputs, the last is not run
    if steps < 1:
        raise RuntimeError(f"EVA called the model {len(calls)} times; expected two steps or more")
    comparison, a_step = calls[1] - calls[0], (calls[-1] - calls[1]) / steps
    whole = comparison + a_step * len(batches)
    note = (
        f"{steps} of {len(batches)} SVD steps measured; comparison of inputs "
        f"{case.scaled(comparison, blocks):.1f} s"
    )
    return Result(case.scaled(whole, blocks), blocks, steps * case.batch_size, note)


def corda(case: Case) -> Result:
    """PEFT's, in its default mode; batches of one sample, since it fails on larger ones."""
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not require

    blocks = case.blocks()
    model = case.block_model(blocks)
    samples = case.block_batches(min(CORDA_SAMPLES, case.samples), 1)
    config = lora_config(case.rank, init_lora_weights="corda", corda_config=CordaConfig())
    default = default_seconds(model, case.rank)
    reading = 0.0

    def read() -> None:
        nonlocal reading
        reading = timed(lambda: [model.model(input_ids=s["input_ids"]) for s in samples])[0]

    whole = timed(lambda: preprocess_corda(model, config, run_model=read))[0]
    initialization = timed(lambda: get_peft_model(model, config))[0] - default
    covariances = case.scaled(reading * case.samples / len(samples), blocks)
    rest = case.scaled(whole - reading + initialization, blocks)
    note = f"covariances {covariances:.1f} s, inverses and SVD {rest:.1f} s"
    return Result(covariances + rest, blocks, len(samples), note)


PEFT = f"PEFT {peft.__version__}"
RECIPE = "recipes.py"
# Key: title, whose code, how. In the order in which they run: the whole model's first.
METHODS: dict[str, tuple[str, str, Callable[[Case], Result]]] = {
    "filet": ("FILet, ours", "filet", filet_ours),
    "filet-paper": ("FILet, as written", RECIPE, filet_paper),
    "lora-ga": ("LoRA-GA", PEFT, lora_ga),
    "olora": ("OLoRA", PEFT, of_weights(MORE_BLOCKS, REPEATS, init_lora_weights="olora")),
    "pissa-fast": (
        "PiSSA fast (niter 4)",
        PEFT,
        of_weights(MORE_BLOCKS, REPEATS, init_lora_weights="pissa_niter_4"),
    ),
    "pissa": ("PiSSA", PEFT, of_weights(1, 1, init_lora_weights="pissa")),
    "milora": ("MiLoRA", RECIPE, milora_recipe),
    "kasa": ("KaSA", PEFT, of_weights(1, 1, kasa_config=KasaConfig())),
    "lora-dash": ("LoRA-Dash, extra phase", RECIPE, dash_recipe),
    "corda": ("CorDA", PEFT, corda),
    "eva": ("EVA", PEFT, eva),
}


class TimeLimit(Exception):
    """A method took longer than it may."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the block after so long, or when the call of torch then running ends."""

    def stop(number: int, frame: Any) -> None:
        raise TimeLimit(f"stopped at the limit of {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def attempt(method: Callable[[Case], Result], case: Case, limit: float) -> Result | str:
    """The result, or why there is none."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    try:
        with limited(limit):
            return method(case)
    except Exception as error:  # goes into the table: the other methods are still to be measured
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def measure(key: str, case: Case, methods: Sequence[str], limit: float) -> list[dict[str, Any]]:
    """Prints a table and returns its rows: one for each method, LoRA's default first."""
    shape = case.shape
    print(f"\n{shape.title}, {shape.blocks} blocks")
    print("extra s, × FILet, blocks, samples measured: method (code): parts")
    timed(lambda: case.model)
    default = default_seconds(case.model, case.rank)
    print(f"{0:9.2f} {'':8} {'all':>8} {'':>9}  LoRA's default (takes {default:.2f} s)", flush=True)
    records: list[dict[str, Any]] = []
    ours = float("nan")
    for name in methods:
        title, code, method = METHODS[name]
        result = attempt(method, case, limit)
        record = {
            "shape": key, "method": title, "code": code, "extra_seconds": "", "times_filet": "",
            "blocks_measured": "", "blocks": shape.blocks, "samples_measured": "",
            "samples": case.samples, "length": case.length, "rank": case.rank,
            "default_seconds": default, "note": "",
        }  # fmt: skip
        if isinstance(result, str):
            record["note"] = result
            print(f"{'—':>9} {'':8} {'':8} {'':9}  {title} ({code}): {result}", flush=True)
        else:
            ours = result.seconds if name == "filet" else ours
            ratio = result.seconds / ours
            note = result.note
            if result.blocks < shape.blocks or 0 < result.samples < case.samples:
                note = f"scaled; {note}" if note else "scaled"
            record |= {
                "extra_seconds": result.seconds, "times_filet": ratio,
                "blocks_measured": result.blocks, "samples_measured": result.samples,
                "note": note,
            }  # fmt: skip
            of_blocks = f"{result.blocks}/{shape.blocks}"
            of_samples = f"{result.samples}/{case.samples}" if result.samples else "no data"
            print(
                f"{result.seconds:9.2f} {ratio:8.2f} {of_blocks:>8} {of_samples:>9}  "
                f"{title} ({code}){': ' if note else ''}{note}",
                flush=True,
            )
        records.append(record)
    return records


def plot(records: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys(r["shape"] for r in records))
    titles = list(dict.fromkeys(r["method"] for r in records))
    figure, axes = plt.subplots(figsize=(11, 4.5))
    for index, key in enumerate(keys):
        seconds = {r["method"]: r["extra_seconds"] for r in records if r["shape"] == key}
        heights = [seconds[title] or 0.0 for title in titles]
        places = [k + (index - len(keys) / 2) * 0.8 / len(keys) for k in range(len(titles))]
        bars = axes.bar(
            places, heights, width=0.8 / len(keys), label=SHAPES[key].title, align="edge"
        )
        labels = [f"{h:.3g}" if h else "—" for h in heights]
        axes.bar_label(bars, labels, fontsize=6)
    axes.set_yscale("log")
    axes.set_xticks(range(len(titles)), titles, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel("seconds on top of LoRA's default")
    first = records[0]
    axes.set_title(
        f"Initialisation, {first['samples']} samples × {first['length']} tokens, r = "
        f"{first['rank']}: {about['gpu']}, {about['date']}\n{about['versions']}; some are scaled, "
        "see methods.csv",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = ["llama-1b", "llama-3b", "llama-8b"]
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=real if CUDA else ["tiny"]
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", type=int, default=SAMPLES if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8 if CUDA else 4)
    parser.add_argument("--rank", type=int, default=32 if CUDA else 8)
    parser.add_argument(
        "--blocks-measured", type=int, default=1, help="of methods that are scaled by the block"
    )
    parser.add_argument(
        "--batches-measured", type=int, default=8, help="of methods that are scaled by the batch"
    )
    parser.add_argument("--limit", type=float, default=60, help="seconds for one method's row")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args(argv)
    if options.samples % options.batch_size:
        parser.error(
            f"--samples {options.samples} must be a multiple of --batch-size {options.batch_size}"
        )
    if not CUDA and options.shapes != ["tiny"]:
        parser.error(f"--shapes {options.shapes} need a GPU; expected tiny without one")
    about = shapes.about()
    methods = [name for name in METHODS if name in options.methods]
    print(
        f"{about['gpu']}; {about['versions']}; {about['date']}; {options.samples} samples × "
        f"{options.length} tokens in batches of {options.batch_size}, r={options.rank}",
        flush=True,
    )
    if CUDA:  # what a first call builds, loads and compiles
        warm = Case(SHAPES["tiny"], 8, 64, 4, 8, 1, 1)
        for name in methods:
            failed = attempt(METHODS[name][2], warm, options.limit)
            if isinstance(failed, str):
                print(f"warm-up of {METHODS[name][0]}: {failed}", flush=True)
    records = []
    for key in options.shapes:
        case = Case(
            SHAPES[key], options.samples, options.length, options.batch_size, options.rank,
            options.blocks_measured, options.batches_measured,
        )  # fmt: skip
        records += measure(key, case, methods, options.limit)
        del case
    write([record | about for record in records], options.output / "methods.csv")
    plot(records, about, options.output / "methods.png")
    print(f"wrote {options.output}/methods.csv and methods.png", file=sys.stderr)


if __name__ == "__main__":
    main()
