"""Several GPUs: data parallel in memory, and the blockwise engine, on 1 … N of them.

    make bench-scale                                       # on 1, 2, 4, … GPUs, all there are
    make bench-scale BENCH_ARGS="--processes 1 2 --only blockwise"
    torchrun --nproc-per-node 4 benchmarks/bench_scale.py  # on these alone, of several machines too

Random weights of real shapes in bfloat16, random tokens without padding. "memory" is
``filet.initialize_lora_filet_weights`` on Llama-3-8B: each process has the model, and its batches
of the 320 samples. "blockwise" are the sweeps of ``filet.initialize_folder`` over some blocks of
Llama-3-70B and its head, from host memory (two blocks of it stand for all), or from the shards of a
folder; the weights that a process reads are its share. Seconds are those of the slowest process
from a common start. Of the blockwise engine they are the median of a block, without the first of
each sweep, forward and reverse; and what 80 blocks would take, extrapolated, not run. "difference"
is the largest relative difference of any energy from those of the first row.

Printed as tables, and written to --output: scale_memory.csv, scale_blockwise.csv. On CPUs small
shapes run, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import filet
import shapes
from bench_blockwise import DEPTH, LARGE, SMALL, SWEEPS, Cycle, write_model
from bench_syrk import write
from filet import FiletConfig
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import empty_model
from filet.blockwise.weights import ShardedWeights, WeightSource
from filet.collect.together import Together
from filet.distributed.group import current

CUDA = torch.cuda.is_available()
GIB = 2**30
MODES = ("memory", "blockwise")
WARM = 2  # batches of the run that warms up


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if CUDA else torch.device("cpu")


def together(value: float) -> list[float]:
    """What each process gave."""
    group = current()
    return [value] if group is None else group.exchanged(value)


def started(device: torch.device) -> float:
    """The time, when all processes are here and their devices idle."""
    if CUDA:
        torch.cuda.synchronize(device)
    together(0.0)
    return time.perf_counter()


def since(start: float, device: torch.device) -> float:
    """Seconds of the slowest process."""
    if CUDA:
        torch.cuda.synchronize(device)
    return max(together(time.perf_counter() - start))


@contextlib.contextmanager
def reductions(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each reduction of moments inside, from where all processes have theirs."""
    seconds: list[float] = []
    plain = Together.moments

    def timed(self: Together, *args: Any, **more: Any) -> Any:
        start = started(device)
        found = plain(self, *args, **more)
        seconds.append(since(start, device))
        return found

    Together.moments = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Together.moments = plain  # type: ignore[method-assign]


def in_memory(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> Any:
    """One initialisation, after a short one; what it took, and its energies."""
    shape = shapes.SHAPES[options.shape]
    model = shapes.with_lora(shapes.build(shape, options.memory_blocks or shape.blocks), 32)
    batches = shapes.token_batches(shape, options.samples, options.length, options.batch_size)
    mine, config = batches[rank::size], FiletConfig(samples=None)
    filet.initialize_lora_filet_weights(model, mine[:WARM], config, show_progress_bar=False)
    if CUDA:
        torch.cuda.reset_peak_memory_stats(device)
    with reductions(device) as seconds:
        start = started(device)
        report = filet.initialize_lora_filet_weights(model, mine, config, show_progress_bar=False)
        whole = since(start, device)
    peak = torch.cuda.max_memory_allocated(device) if CUDA else 0
    row = {
        "what": f"{shape.title}, in memory: all",
        "seconds": whole,
        "reduce_s": sum(seconds),
        "selection_s": report.seconds["selection"],
        "GPU_GiB": max(together(peak)) / GIB,
    }
    return row, {name: its.energies.tolist() for name, its in report.modules.items()}


def weights_of(options: argparse.Namespace, rank: int) -> tuple[Any, WeightSource]:
    """The model without its weights, and where these come from."""
    config = LlamaConfig(
        **(LARGE if CUDA else SMALL), num_hidden_layers=options.blocks,
        max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if options.shards is None:
        return model, Cycle(2, model)
    if rank == 0:
        write_model(options.shards, config, model)
    together(0.0)
    model = empty_model(options.shards)
    return model, ShardedWeights(options.shards, model)


def by_blocks(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> Any:
    """The sweeps over some blocks; what a block took, and the energies."""
    model, source = weights_of(options, rank)
    vocabulary = (LARGE if CUDA else SMALL)["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(options.batch_size)]
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(current() or contextlib.nullcontext())
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        if group is not None:
            place = group.from_first(place)  # of which all processes write
        run = stack.enter_context(
            Blockwise(
                model, source, batches[rank::size], lora, FiletConfig(samples=None), device=device,
                run_folder=Path(place) / "run", host_memory=int(options.host_memory * GIB),
                show_progress_bar=False, group=group,
            )
        )  # fmt: skip
        started(device)
        run.sweep()
        energies: dict[str, list[float]] = {}
        for finished in run.journal.finished() if rank == 0 else ():
            energies |= {n: its.energies.tolist() for n, its in finished.choice.reports.items()}
        return row_of_blocks(run, options.blocks), energies


def row_of_blocks(run: Blockwise, blocks: int) -> dict[str, Any]:
    """Of the slowest process each."""
    assert run.boundaries is not None
    times = run.times
    steady = {
        sweep: max(together(statistics.median(times.blocks[sweep][1:] or times.blocks[sweep])))
        for sweep in ("forward", "reverse")
    }
    whole = max(together(sum(times.seconds[sweep] for sweep in SWEEPS)))
    waits = {what: together(seconds) for what, seconds in times.waited.items()}
    both = sum(steady.values())
    once = max(together(times.seconds["preparing"])) + whole - blocks * both
    made = run.boundaries.pool.made * run.boundaries.layout.nbytes
    return {
        "what": f"{'Llama-3-70B' if CUDA else 'tiny'}, blockwise: a block",
        "seconds": both,
        "forward_s": steady["forward"],
        "reverse_s": steady["reverse"],
        "sweeps_s": whole,
        f"blocks_{DEPTH}_s": DEPTH * both + once,
        **{f"waited_{what}_%": 100 * max(each) / whole for what, each in waits.items()},
        "GPU_GiB": max(together(run.memory.most)) / GIB,
        "host_GiB": max(together(made)) / GIB,
    }


def measured(options: argparse.Namespace, rank: int, local: int, size: int) -> list[Any]:
    """The rows of one number of processes, each with its energies."""
    device = device_of(local)
    if CUDA:
        torch.cuda.set_device(device)
    found = []
    for mode in options.only:
        row, energies = (in_memory if mode == "memory" else by_blocks)(options, rank, size, device)
        found.append(({"mode": mode, "processes": size, **row}, energies))
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return found


def process(rank: int, size: int, options: argparse.Namespace, folder: str) -> None:
    """One process of several that were started here."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if CUDA:
        torch.cuda.set_device(rank)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        where = f"file://{folder}/rendezvous-{size}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=size)
    found = measured(options, rank, rank, size)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def compared(rows: Sequence[tuple[dict[str, Any], dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """The rows with what is to be said beside the first of their mode."""
    first: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {}
    found = []
    for row, energies in rows:
        base, others = first.setdefault(row["mode"], (row, energies))
        speedup = base["seconds"] / row["seconds"]
        share = row["processes"] / base["processes"]
        both = [(numbers_of(energies[name]), numbers_of(others[name])) for name in others]
        differences = [((one - two).abs() / two.abs()).nan_to_num().max() for one, two in both]
        extra = {
            "speedup": speedup,
            "efficiency": speedup / share,
            "difference": float(torch.stack(differences).max()),
        }
        found.append({**row, **extra})
    return found


def numbers_of(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def show(rows: Sequence[dict[str, Any]]) -> None:
    for mode in MODES:
        mine = [row for row in rows if row["mode"] == mode]
        if not mine:
            continue
        print(f"\n{mine[0]['what']}")
        names = [name for name in mine[0] if name not in ("mode", "what")]
        print("  ".join(f"{name:>10}" for name in names))
        for row in mine:
            cells = [f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names]
            print(
                "  ".join(
                    f"{cell:>{max(10, len(n))}}" for cell, n in zip(cells, names, strict=True)
                )
            )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    there = torch.cuda.device_count() if CUDA else 2
    default = [2**k for k in range(there.bit_length()) if 2**k <= there]
    parser.add_argument(
        "--processes", type=int, nargs="+", default=default, help="how many, in turn (default: all)"
    )
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--memory-blocks", type=int, help="of that shape (default: all)")
    parser.add_argument("--blocks", type=int, default=16 if CUDA else 3, help="of blockwise")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="as for bench_blockwise.py")
    parser.add_argument("--samples", type=int, default=shapes.SAMPLES if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8 if CUDA else 4)
    parser.add_argument(
        "--host-memory", type=float, default=56 if CUDA else 1, help="GiB, of a machine"
    )
    parser.add_argument("--folder", type=Path, help="where the run folder goes (a fast disk)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    return parser.parse_args(argv)


def started_here(options: argparse.Namespace) -> list[Any]:
    """The rows of each number of processes, started one number after the other."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.processes:
            torch.multiprocessing.spawn(process, (size, options, folder), nprocs=size)
            found += json.loads((Path(folder) / "found.json").read_text())
            print(f"{size} measured", flush=True)
    return found


def by_launcher(options: argparse.Namespace) -> list[Any]:
    """The rows of the processes that torchrun started; of the first process alone."""
    local, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
    if CUDA:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    found = measured(options, rank, local, dist.get_world_size())
    dist.destroy_process_group()
    return found if rank == 0 else []


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    found = by_launcher(options) if launched else started_here(options)
    if found:
        rows = compared(found)
        show(rows)
        about = shapes.about()
        for mode in options.only:
            mine = [{**row, **about} for row in rows if row["mode"] == mode]
            write(mine, options.output / f"scale_{mode}.csv")
        print(f"\n{about['gpu']}; {about['versions']}; {about['date']}: {options.output}")


if __name__ == "__main__":
    main()
