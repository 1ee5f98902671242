"""A whole model: FILet's statistics and initialisation against a bare forward and backward.

    make bench-model

Random weights of a real shape (bfloat16, frozen), random tokens without padding. Three things take
turns over the same batches, round after round, after a short round that warms up:
(a) forward and backward of the bare model: no hooks, its own loss, torch's defaults; the output of
the embedding asks for a gradient; (b) ``filet.collect_statistics``; (c)
``filet.initialize_lora_filet_weights``: statistics, selection and writing. Beside (a) stands the
same with the fused norms and gates that (b) and (c) run the model by, which they do not owe to
second moments. Times are medians of the host's clock with the device idle at both ends. The
accounted floor is that plus the second moments alone, one ``syrk_`` each at the batch's shape,
timed in the same process.

``--paper`` adds the paper as written: S_X (n, n) and S_Y (m, m) of every layer, not shared, by
``C.add_(mm → fp32)``, on as many blocks as fit, scaled to all of them.
``--profile`` says where the time of three batches of the statistics goes, kernel by kernel.
Written to --output: model_<shape>.csv, and profile_<shape>.txt, .json.gz (a chrome trace).
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import filet
import shapes
from bench_syrk import time_in_turn, write
from filet.model.fused import fused
from filet_kernels import syrk_
from recipes import AsWritten
from shapes import CUDA, DEVICE, SAMPLES, SHAPES, Shape, synchronize

Batches = Sequence[dict[str, Tensor]]
GIB = 2**30
WARM = 2  # batches of the round that warms up
PROFILED = 3  # batches in the profile, after two that are not
PAPER_BATCHES = 8  # at most: it is a multiple of the bare pass
LONGEST = 25


def bare(model: nn.Module, batches: Batches) -> None:
    """Forward and backward of the frozen model; the embedding's output asks for a gradient."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    for batch in batches:
        inputs = embed(batch["input_ids"].to(DEVICE)).detach().requires_grad_()
        labels = batch["labels"].to(DEVICE)
        model(inputs_embeds=inputs, labels=labels, use_cache=False).loss.backward()


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, GiB at the peak over what was allocated before, and the result."""
    gc.collect()  # an earlier round's copies, where they hang in cycles
    synchronize()
    before = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    synchronize()
    seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if CUDA else float("nan")
    return seconds, peak, result


def one_round(model: nn.Module, batches: Batches, rank: int) -> dict[str, Any]:
    """(a), (b) and (c) in turn."""
    config = filet.FiletConfig(samples=None)
    results: dict[str, Any] = {}
    results["bare"], results["bare peak"], _ = timed(lambda: bare(model, batches))
    with fused(model):
        results["fused"], results["fused peak"], _ = timed(lambda: bare(model, batches))
    # A fresh adapter each time: (c) gives it its start.
    peft_model = shapes.with_lora(model, rank)
    results["statistics"], results["statistics peak"], taken = timed(
        lambda: filet.collect_statistics(peft_model, batches, config, show_progress_bar=False)
    )
    sums = {
        id(side): side.sum for m in taken.moments.values() for side in (m.input, m.output)
    }.values()
    results["statistics bytes"] = sum(s.numel() * s.element_size() for s in sums)
    results["sizes"] = Counter(s.shape[0] for s in sums)
    del taken, sums
    results["initialize"], results["initialize peak"], report = timed(
        lambda: filet.initialize_lora_filet_weights(
            peft_model, batches, config, show_progress_bar=False
        )
    )
    results["seconds"] = report.seconds
    return results


def moments_alone(sizes: Counter[int], tokens: int, rounds: int) -> dict[int, float]:
    """Milliseconds of one syrk_ of a batch, by size of the moment."""
    runs: dict[str, Callable[[], Any]] = {}
    for n in sizes:
        X, C = (
            torch.randn(tokens, n, device=DEVICE).bfloat16(),
            torch.zeros(n, n, device=DEVICE),
        )
        runs[str(n)] = lambda C=C, X=X: syrk_(C, X)  # type: ignore[misc]
    times = time_in_turn(runs, rounds)
    return {n: times[str(n)][1] for n in sizes}


def paper_blocks(shape: Shape, blocks: int, bare_peak: float) -> int:
    """How many blocks' statistics as written fit beside the model and its pass."""
    sizes = [size for mn in shape.linears().values() for size in mn]
    a_block = 4 * sum(size**2 for size in sizes)
    if not CUDA:
        return blocks
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - bare_peak * GIB - 2 * 4 * max(sizes) ** 2
    fitting = int(0.9 * free / a_block)
    if fitting < 1:
        raise RuntimeError(
            f"--paper: the statistics of one block as the paper writes them take "
            f"{a_block / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free beside the pass; expected "
            "a smaller --batch-size or --blocks"
        )
    return min(fitting, blocks)


def paper(
    model: nn.Module, shape: Shape, blocks: int, batches: Batches, bare_peak: float, rounds: int
) -> tuple[float, int]:
    """Milliseconds a batch that the paper's statistics add for all blocks, and of how many."""
    measured = paper_blocks(shape, blocks, bare_peak)
    batches = batches[:PAPER_BATCHES]
    extra = []
    for number in range(rounds + 1):  # the first warms up
        without = timed(lambda: bare(model, batches))[0]
        hooks = AsWritten(shapes.linears(model, measured))
        with_hooks = timed(lambda: bare(model, batches))[0]
        hooks.remove()
        del hooks
        if number:
            extra.append(1e3 * (with_hooks - without) / len(batches) * blocks / measured)
    return statistics.median(extra), measured


# The profile.


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy, on the device."""

    name: str
    start: float  # µs
    duration: float
    within: tuple[str, ...]  # operators of the host that enclose its launch, outermost first
    dims: str  # of the innermost operator's arguments
    backward: bool  # launched within the backward
    copy: bool


def own_functions() -> dict[str, str]:
    """The library's autograd functions → the category of what they launch beside products."""
    kinds = {"filet": "y/h conversions", "filet_kernels": "norms, gates, positions"}
    found = {}
    for name, module in list(sys.modules.items()):
        if (kind := kinds.get(name.partition(".")[0])) is not None:
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                    found[value.__name__] = found[f"{value.__name__}Backward"] = kind
    return found


def category(kernel: Kernel, vocabulary: int, own: dict[str, str]) -> str:
    name = kernel.name.lower()
    within = kernel.within
    text = " ".join(within).lower()
    if any(scope.startswith("filet_kernels::") for scope in within):
        return next(s for s in within if s.startswith("filet_kernels::"))
    if kernel.copy:
        return "memory copies"
    if any(word in name or word in text for word in ("flash", "fmha", "attention", "sdpa")):
        return "attention"
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    if any(word in name for word in ("gemm", "nvjet", "splitk", "cutlass")) or (
        within and within[-1] in products
    ):
        return "products, backward" if kernel.backward else "products, forward"
    for scope in reversed(within):
        if scope in own:
            return own[scope]
    losses = ("cross_entropy", "nll_loss", "nllloss", "log_softmax", "logsoftmax")
    if any(word in text for word in losses) or str(vocabulary) in kernel.dims:
        return "loss"
    words = ("elementwise", "reduce", "copy", "norm", "silu", "cat", "index", "fill", "aten::")
    if any(word in name for word in words):
        return "elementwise and reductions"
    return "other"


def kernels(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels of a chrome trace in the order of their start, with where they were launched.

    Without a GPU: the operators, with the time that none of those within them takes.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    operators = defaultdict(list)  # by thread
    launches = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[event["tid"]].append(event)
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event
    points = defaultdict(list)  # by thread: launches, and for a CPU the operators themselves
    if on_device:
        for event in on_device:
            launch = launches.get(event["args"].get("correlation"))
            if launch is not None:
                points[launch["tid"]].append((launch["ts"], event))
    else:
        for thread, ops in operators.items():
            points[thread] = [(op["ts"], op) for op in _own_time(ops)]
    found = []
    placed = set()
    for thread, marks in points.items():
        for event, scopes in _enclosing(operators[thread], marks):
            placed.add(id(event))
            args = scopes[-1].get("args", {}) if scopes else {}
            names = tuple(scope["name"] for scope in scopes)
            # The backward runs in the thread that asks for it (filet.model.isolation).
            back = any("autograd::engine::evaluate_function" in name for name in names)
            found.append(_kernel(event, names, str(args.get("Input Dims", "")), back))
    found += [_kernel(e, (), "", False) for e in on_device if id(e) not in placed]
    return sorted(found, key=lambda kernel: kernel.start)


def _kernel(event: dict[str, Any], within: tuple[str, ...], dims: str, backward: bool) -> Kernel:
    copy = event["cat"] in ("gpu_memcpy", "gpu_memset")
    return Kernel(event["name"], event["ts"], event["dur"], within, dims, backward, copy)


def _own_time(operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = sorted(operators, key=lambda op: (op["ts"], -op["dur"]))
    own = [dict(op) for op in ordered]
    stack: list[int] = []
    for index, op in enumerate(ordered):
        while stack and ordered[stack[-1]]["ts"] + ordered[stack[-1]]["dur"] <= op["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]]["dur"] -= op["dur"]
        stack.append(index)
    return own


def _enclosing(
    operators: list[dict[str, Any]], marks: list[tuple[float, dict[str, Any]]]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each mark of a thread with the operators that are open at its time, outermost first."""
    ordered = sorted(operators, key=lambda op: (op["ts"], -op["dur"]))
    place, stack = 0, []
    for time_, event in sorted(marks, key=lambda mark: mark[0]):
        while place < len(ordered) and ordered[place]["ts"] <= time_:
            stack.append(ordered[place])
            place += 1
            while len(stack) > 1 and stack[-2]["ts"] + stack[-2]["dur"] <= stack[-1]["ts"]:
                del stack[-2]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] < time_:
            stack.pop()
        yield event, list(stack)


def busy(found: Iterable[Kernel]) -> float:
    """µs in which at least one kernel runs; ``found`` in the order of their start."""
    total, end = 0.0, float("-inf")
    for kernel in found:
        stop = kernel.start + kernel.duration
        total += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return total


def summary(
    found: list[Kernel], vocabulary: int, batches: int, milliseconds: float, on_gpu: bool
) -> str:
    """The profile as text: categories, launches, idle share, the longest kernels."""
    own = own_functions()
    what = "kernels" if on_gpu else "operators (no GPU: no statement on speed)"
    kinds: dict[str, list[float]] = defaultdict(list)
    names: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in found:
        kind = category(kernel, vocabulary, own)
        kinds[kind].append(kernel.duration)
        names[kernel.name, kind].append(kernel.duration)
    total = sum(kernel.duration for kernel in found)
    lines = [f"{len(found) / batches:.0f} {what} a batch, {batches} batches of collect_statistics"]
    if on_gpu:
        working = busy(found) / 1e3 / batches
        end = max(kernel.start + kernel.duration for kernel in found)
        elapsed = (end - found[0].start) / 1e3 / batches
        lines.append(
            f"busy {working:.2f} ms a batch; first to last {elapsed:.2f} ms under the profiler: "
            f"idle {1 - working / elapsed:.1%}; {milliseconds:.2f} ms without it: idle "
            f"{1 - working / milliseconds:.1%}"
        )
    lines += ["", "category                        ms a batch   share   launches"]
    for kind, durations in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        lines.append(
            f"{kind:30} {sum(durations) / 1e3 / batches:11.3f} {sum(durations) / total:7.1%} "
            f"{len(durations) / batches:10.1f}"
        )
    lines += ["", f"the longest {what.split()[0]}: ms a batch, launches a batch, category, name"]
    ranked = sorted(names.items(), key=lambda item: -sum(item[1]))
    for (name, kind), durations in ranked[:LONGEST]:
        lines.append(
            f"{sum(durations) / 1e3 / batches:9.3f} {len(durations) / batches:7.1f}  {kind:28} "
            f"{name[:110]}"
        )
    return "\n".join(lines)


def profiled(model: nn.Module, batches: Batches, rank: int, path: Path) -> list[Kernel]:
    """Profile three batches of a run of collect_statistics, after two; writes the trace."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    profiler = profile(activities=activities, record_shapes=True)
    supply = [batches[k % len(batches)] for k in range(PROFILED + 3)]

    def feed() -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(supply):
            if index == 2:
                synchronize()
                profiler.start()
            elif index == 2 + PROFILED:
                synchronize()
                profiler.stop()
            yield batch

    peft_model = shapes.with_lora(model, rank)
    config = filet.FiletConfig(samples=None)
    filet.collect_statistics(peft_model, feed(), config, show_progress_bar=False)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        found = kernels(json.load(file))
    if not found:
        raise RuntimeError("the profile holds no kernel; expected batches to be read one by one")
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--blocks", type=int, help="the first so many (default: all)")
    parser.add_argument("--samples", type=int, default=SAMPLES if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8 if CUDA else 4)
    parser.add_argument("--rank", type=int, default=32 if CUDA else 8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="also the paper as written")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args(argv)
    if options.samples % options.batch_size:
        parser.error(
            f"--samples {options.samples} must be a multiple of --batch-size {options.batch_size}: "
            "times are given per batch"
        )
    if not CUDA and options.shape != "tiny":
        parser.error(f"--shape {options.shape} needs a GPU; expected --shape tiny without one")
    options.blocks = options.blocks or SHAPES[options.shape].blocks
    return options


class Figures:
    """The medians of all rounds, in ms a batch where it does not say otherwise."""

    def __init__(self, options: argparse.Namespace, rounds: Sequence[Mapping[str, Any]]) -> None:
        self.rounds = rounds
        self.count = options.samples // options.batch_size
        self.to_all = SAMPLES / options.samples
        self.sizes: Mapping[int, int] = rounds[0]["sizes"]
        tokens = options.batch_size * options.length
        self.alone = moments_alone(self.sizes, tokens, max(options.rounds, 5))
        self.syrk = sum(self.alone[n] * self.sizes[n] for n in self.sizes)
        self.bare, self.fused, self.taking, self.all = (
            1e3 * self.median(key) / self.count
            for key in ("bare", "fused", "statistics", "initialize")
        )
        self.seconds = {
            key: statistics.median(result["seconds"][key] for result in rounds)
            for key in rounds[0]["seconds"]
        }
        more = self.seconds["statistics"] * (self.to_all - 1)
        self.scaled = 1e3 * (self.median("initialize") + more) / (self.count * self.to_all)

    def median(self, key: str) -> float:
        return statistics.median(result[key] for result in self.rounds)

    def rows(self) -> list[tuple[str, float, float]]:
        """What, ms a batch, GiB over the weights."""
        nan = float("nan")
        rows = [
            ("(a) bare forward and backward", self.bare, self.median("bare peak")),
            ("(a) with fused norms and gates", self.fused, self.median("fused peak")),
            ("floor: that + syrk_ alone", self.fused + self.syrk, nan),
            ("(b) collect_statistics", self.taking, self.median("statistics peak")),
            ("(c) initialize", self.all, self.median("initialize peak")),
        ]
        if self.to_all != 1:
            rows.append((f"(c) scaled to {SAMPLES} samples", self.scaled, nan))
        return rows


def show(figures: Figures, rows: Sequence[tuple[str, float, float]], weights: int) -> None:
    print("\nms a batch, × (a), GiB over the weights at the peak")
    for what, milliseconds, peak in rows:
        print(f"{milliseconds:10.2f} {milliseconds / figures.bare:7.3f} {peak:8.2f}  {what}")
    count, sizes, alone = figures.count, figures.sizes, figures.alone
    samples = round(SAMPLES / figures.to_all)
    print(
        f"\n(c) in seconds, {samples} samples: {figures.median('initialize'):.2f} in all; "
        + ", ".join(f"{key} {value:.2f}" for key, value in figures.seconds.items())
    )
    if figures.to_all != 1:
        whole = figures.scaled * count * figures.to_all / 1e3
        print(f"(c) scaled to {SAMPLES} samples: {whole:.2f} s")
    paired = [1e3 * (r["statistics"] - r["fused"]) / count for r in figures.rounds]
    print(
        f"(b) − fused (a): {statistics.median(paired):.2f} ms a batch; "
        f"syrk_ alone {figures.syrk:.2f}: "
        + ", ".join(f"{sizes[n]} × n={n} at {alone[n]:.3f}" for n in sorted(sizes))
    )
    print(
        f"weights {weights / GIB:.2f} GiB; statistics "
        f"{figures.rounds[0]['statistics bytes'] / GIB:.3f} GiB in {sum(sizes.values())} moments",
        flush=True,
    )


def records(
    options: argparse.Namespace,
    figures: Figures,
    rows: Sequence[tuple[str, float, float]],
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The rows as the CSV has them."""
    return [
        {
            "shape": options.shape, "blocks": options.blocks, "samples": options.samples,
            "length": options.length, "batch_size": options.batch_size, "rank": options.rank,
            "what": what, "ms_a_batch": milliseconds, "times_bare": milliseconds / figures.bare,
            "GiB_over_weights": peak,
            "statistics_GiB": figures.rounds[0]["statistics bytes"] / GIB,
            **about,
        }
        for what, milliseconds, peak in rows
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    shape, blocks, about = SHAPES[options.shape], options.blocks, shapes.about()
    print(
        f"{shape.title}: {blocks} of {shape.blocks} blocks, {options.samples} samples × "
        f"{options.length} tokens in batches of {options.batch_size}, r={options.rank}, bf16; "
        f"{about['gpu']}; {about['versions']}; {about['date']}; {options.rounds} rounds",
        flush=True,
    )
    model = shapes.build(shape, blocks)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = shapes.token_batches(shape, options.samples, options.length, options.batch_size)
    one_round(model, batches[:WARM], options.rank)
    rounds = [one_round(model, batches, options.rank) for _ in range(options.rounds)]
    figures = Figures(options, rounds)
    rows = figures.rows()
    if options.paper:
        peak = figures.median("bare peak")
        more, on = paper(model, shape, blocks, batches, peak, options.rounds)
        title = "the paper's statistics as written"
        if on < blocks:
            title += f", measured on {on} of {blocks} blocks, scaled"
        rows.append((title, figures.bare + more, float("nan")))
    show(figures, rows, weights)
    write(records(options, figures, rows, about), options.output / f"model_{options.shape}.csv")
    if options.profile:
        stem = options.output / f"profile_{options.shape}"
        launched = profiled(model, batches, options.rank, stem.with_suffix(".json.gz"))
        text = summary(launched, shape.vocabulary, PROFILED, figures.taking, CUDA)
        stem.with_suffix(".txt").write_text(f"{shape.title}, {about}\n{text}\n")
        print(f"\n{text}")
    print(f"wrote to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
