"""Several GPUs: data parallel, sharded by FSDP2, and the blockwise engine, on 1 … N of them.

    make bench-scale                                       # on 1, 2, 4, … GPUs, all there are
    make bench-scale BENCH_ARGS="--processes 1 2 --modes blockwise"
    torchrun --nproc-per-node 4 benchmarks/bench_scale.py  # on these alone, of several machines too

Random weights of real shapes in bfloat16, random tokens without padding. "data" is
``filet.initialize_lora_filet_weights`` on Llama-3-8B: each process has the model, and its batches
of the 320 samples. "fsdp2" is the same of a model that ``fully_shard`` has divided by blocks; it is
compared with "data" of one process. "blockwise" are the sweeps of ``filet.initialize_folder`` over
some blocks of Llama-3-70B and its head, from host memory (two blocks of it stand for all), or from
the shards of a folder; the weights that a process reads are its share. Seconds are those of the
slowest process from a common start. Of the blockwise engine they are the median of a block, without
the first of each sweep, forward and reverse; and what 80 blocks would take, extrapolated, not run.
"difference" is the largest relative difference of any energy from those that it is compared with.
"expected_GiB" of fsdp2 is the part of the model, the moments and one block whole; activations come
on top.

A row is printed as soon as it is there. Each mode and number of processes has processes of its own,
and a time (--limit); one that fails, or takes longer, is a row that says so. All rows, what N GPUs
and Llama-3.1-405B would take by them (scale_model.py), and the versions are in scale.json of
--output, written anew after each row; scale.png is the picture. On CPUs small shapes run, whose
times mean nothing.
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
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import filet
import scale_model
import shapes
from bench_blockwise import DEPTH, LARGE, SMALL, SWEEPS, Cycle, write_model
from filet import FiletConfig
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import empty_model
from filet.blockwise.weights import ShardedWeights, WeightSource
from filet.blockwise.work import Work
from filet.collect.together import Together
from filet.distributed.group import current

CUDA = torch.cuda.is_available()
GIB = 2**30
MODES = ("data", "fsdp2", "blockwise")
WARM = 2  # batches of the run that warms up

Found = tuple[dict[str, Any], dict[str, list[float]]]
"""A row, and the energies of each module."""


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if CUDA else torch.device("cpu")


def together(value: float) -> list[float]:
    """What each process gave."""
    group = current()
    return [value] if group is None else group.exchanged(value)


def started(device: torch.device) -> float:
    """The time, when all processes are here and their devices idle."""
    idle(device)
    together(0.0)
    return time.perf_counter()


def idle(device: torch.device) -> None:
    if CUDA:
        torch.cuda.synchronize(device)


def since(start: float, device: torch.device) -> float:
    """Seconds of the slowest process."""
    idle(device)
    return max(together(time.perf_counter() - start))


@contextlib.contextmanager
def timed(kind: type, name: str, device: torch.device, from_common: bool) -> Iterator[list[Any]]:
    """Of each call of a method inside, its seconds and what it returned.

    ``from_common``: from where all processes call it, and of the slowest of them.
    """
    calls: list[Any] = []
    plain = getattr(kind, name)

    def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        if from_common:
            start = started(device)
        else:
            idle(device)
            start = time.perf_counter()
        found = plain(self, *args, **more)
        if from_common:
            calls.append((since(start, device), found))
        else:
            idle(device)
            calls.append((time.perf_counter() - start, found))
        return found

    setattr(kind, name, wrapped)
    try:
        yield calls
    finally:
        setattr(kind, name, plain)


def model_in_memory(options: argparse.Namespace, sharded: bool, device: torch.device) -> Any:
    """The model with an adapter; where it is sharded, its bytes here and those of a block whole."""
    shape = shapes.SHAPES[options.shape]
    model = shapes.with_lora(shapes.build(shape, options.data_blocks or shape.blocks), 32)
    if not sharded:
        return model, 0, 0
    # Of a unit of FSDP2 all parameters have one dtype. The positions' buffers keep theirs: rounded,
    # they moved energies of the tiny shape by 0.004.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(shapes.DTYPE)
    layers = model.base_model.model.model.layers
    block = sum(parameter.nbytes for parameter in layers[0].parameters())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gc.collect()
    here = sum(parameter.to_local().nbytes for parameter in model.parameters())
    return model, here, block


def in_memory(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> Any:
    """One initialisation, after a short one; what it took, and its energies."""
    return _in_memory(options, rank, size, device, sharded=False)


def sharded(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> Any:
    """The same of a model that FSDP2 has divided."""
    return _in_memory(options, rank, size, device, sharded=True)


def _in_memory(
    options: argparse.Namespace, rank: int, size: int, device: torch.device, sharded: bool
) -> Any:
    shape = shapes.SHAPES[options.shape]
    model, part, block = model_in_memory(options, sharded, device)
    batches = shapes.token_batches(shape, options.samples, options.length, options.batch_size)
    mine, config = batches[rank::size], FiletConfig(samples=None)
    filet.initialize_lora_filet_weights(model, mine[:WARM], config, show_progress_bar=False)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with timed(Together, "moments", device, from_common=True) as reductions:
        start = started(device)
        report = filet.initialize_lora_filet_weights(model, mine, config, show_progress_bar=False)
        whole = since(start, device)
    peak = torch.cuda.max_memory_allocated(device) if CUDA else 0
    how = "FSDP2" if sharded else "data parallel"
    row = {
        "what": f"{shape.title}, in memory, {how}: all",
        "seconds": whole,
        "reduce_s": sum(seconds for seconds, _ in reductions),
        **{f"{part}_s": seconds for part, seconds in report.seconds.items()},
        "GPU_GiB": max(together(peak)) / GIB,
    }
    if sharded:
        # Before they were reduced, every process had all of a pass.
        sums = max((sums_of(found[0]) for _, found in reductions), default=0)
        row["part_GiB"] = max(together(part)) / GIB
        row["moments_GiB"] = sums / GIB
        row["block_GiB"] = block / GIB
        row["expected_GiB"] = (max(together(part)) + sums + block) / GIB
    return row, {name: its.energies.tolist() for name, its in report.modules.items()}


def sums_of(moments: dict[str, Any]) -> int:
    """Bytes of all sums, those that are with other processes now included; each once."""
    sums = {id(side.sum): side.sum for its in moments.values() for side in (its.input, its.output)}
    return sum(sum_.numel() * sum_.itemsize for sum_ in sums.values())


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
        choosing = stack.enter_context(timed(Work, "finished", device, from_common=False))
        reducing = stack.enter_context(timed(Work, "taken", device, from_common=False))
        started(device)
        run.sweep()
        energies: dict[str, list[float]] = {}
        for finished in run.journal.finished() if rank == 0 else ():
            energies |= {n: its.energies.tolist() for n, its in finished.choice.reports.items()}
        of_block = {"selection": seconds_of(choosing), "reduce": seconds_of(reducing)}
        return row_of_blocks(run, options.blocks, of_block), energies


def seconds_of(calls: Sequence[Any]) -> float:
    """The median, without the first; of the slowest process."""
    seconds = [each for each, _ in calls]
    return max(together(statistics.median(seconds[1:] or seconds)))


def row_of_blocks(run: Blockwise, blocks: int, of_block: dict[str, float]) -> dict[str, Any]:
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
    # Of a block (scale_model.py).
    lost = max(waits["weights"]) / blocks + max(waits["disk"]) / blocks
    pieces = {
        "tokens_s": max(both - lost - sum(of_block.values()), 0.0),
        **{f"{name}_s": seconds for name, seconds in of_block.items()},
        "load_s": max(together(run.stream.loading)),
        "disk_s": max(waits["disk"]) / blocks,
    }
    once = max(together(times.seconds["preparing"])) + whole - blocks * both
    made = run.boundaries.pool.made * run.boundaries.layout.nbytes
    return {
        "what": f"{'Llama-3-70B' if CUDA else 'tiny'}, blockwise: a block",
        "seconds": both,
        "forward_s": steady["forward"],
        "reverse_s": steady["reverse"],
        "sweeps_s": whole,
        **pieces,
        f"blocks_{DEPTH}_s": DEPTH * both + once,
        **{f"waited_{what}_%": 100 * max(each) / whole for what, each in waits.items()},
        "GPU_GiB": max(together(run.memory.most)) / GIB,
        "host_GiB": max(together(made)) / GIB,
    }


RUN = {"data": in_memory, "fsdp2": sharded, "blockwise": by_blocks}


def measured(options: argparse.Namespace, mode: str, rank: int, local: int, size: int) -> Found:
    """The row of a mode by one number of processes, and its energies."""
    device = device_of(local)
    if CUDA:
        torch.cuda.set_device(device)
    row, energies = RUN[mode](options, rank, size, device)
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return {"mode": mode, "processes": size, **row}, energies


def process(rank: int, size: int, mode: str, options: argparse.Namespace, folder: str) -> None:
    """One process of several that were started here."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if CUDA:
        torch.cuda.set_device(rank)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        where = f"file://{folder}/rendezvous"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=size)
    found = measured(options, mode, rank, rank, size)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def failed(mode: str, size: int, error: object) -> Found:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1].strip() if lines else type(error).__name__
    return {"mode": mode, "processes": size, "error": text}, {}


class Compared:
    """Rows as they come, each with what is to be said beside the first that it is compared with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows: list[dict[str, Any]] = []
        self._options = options
        self._first: dict[str, Found] = {}

    def add(self, row: dict[str, Any], energies: dict[str, list[float]]) -> None:
        """Take a row, print it, and write all that there are."""
        if "error" not in row:
            base = "data" if row["mode"] == "fsdp2" else row["mode"]
            if base == row["mode"]:
                self._first.setdefault(base, (row, energies))
            row = {**row, **self._beside(row, energies, *self._first.get(base, ({}, {})))}
        self.rows.append(row)
        print(line_of(row), flush=True)
        self.write()

    def _beside(
        self,
        row: dict[str, Any],
        energies: dict[str, list[float]],
        base: dict[str, Any],
        others: dict[str, list[float]],
    ) -> dict[str, Any]:
        if not base:
            return dict.fromkeys(("speedup", "efficiency", "difference"), scale_model.NEEDED)
        speedup = base["seconds"] / row["seconds"]
        both = [(numbers_of(energies[name]), numbers_of(others[name])) for name in others]
        differences = [((one - two).abs() / two.abs()).nan_to_num().max() for one, two in both]
        return {
            "speedup": speedup,
            "efficiency": speedup * base["processes"] / row["processes"],
            "difference": float(torch.stack(differences).max()),
        }

    def write(self) -> None:
        path = self._options.output / "scale.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"about": shapes.about(), "rows": self.rows, "predicted": self.predicted()}
        path.write_text(json.dumps(found, indent=1))

    def predicted(self) -> list[dict[str, Any]]:
        here = shapes.SHAPES["llama-70b" if CUDA else "tiny"]
        return scale_model.table(self.rows, here, [shapes.LARGEST], self._options.predict)


def line_of(row: dict[str, Any]) -> str:
    """A row in one line; columns that are text first."""
    cells = [f"{row['mode']:<9} {row['processes']} processes"]
    cells += [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("mode", "processes", "what")
    ]
    return "  ".join(cells)


def numbers_of(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """As tables, one for rows that have the same columns."""
    for kind in dict.fromkeys(tuple(row) for row in rows):
        mine = [row for row in rows if tuple(row) == kind]
        print(f"\n{mine[0].get('what', '')}")
        names = [name for name in kind if name != "what"]
        lines = [
            [f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names]
            for row in mine
        ]
        widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
        for line in (names, *lines):
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    there = torch.cuda.device_count() if CUDA else 2
    default = [2**k for k in range(there.bit_length()) if 2**k <= there]
    parser.add_argument(
        "--processes", type=int, nargs="+", default=default, help="how many, in turn (default: all)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds of a mode, not of those by torchrun"
    )
    parser.add_argument("--predict", type=int, default=8, help="up to how many GPUs")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--data-blocks", type=int, help="of that shape (default: all)")
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


def run_of(options: argparse.Namespace, mode: str, size: int) -> Found:
    """By processes of its own, which have ended or are ended."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, mode, options, folder)
        context: Any = None
        end = time.monotonic() + options.limit
        try:
            context = torch.multiprocessing.spawn(process, arguments, nprocs=size, join=False)
            while not context.join(timeout=min(5.0, max(end - time.monotonic(), 0.1))):
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {options.limit:.0f} s (--limit)")
            row, energies = json.loads((Path(folder) / "found.json").read_text())
            return row, energies
        except Exception as error:  # the other modes go on
            return failed(mode, size, error)
        finally:
            for each in [] if context is None else context.processes:
                if each.is_alive():
                    each.kill()
                each.join()


def started_here(options: argparse.Namespace, compared: Compared) -> None:
    """Each number of processes, and each mode, one after the other."""
    for size in options.processes:
        for mode in options.modes:
            if mode != "fsdp2" or size > 1:  # of one it is "data"
                compared.add(*run_of(options, mode, size))


def by_launcher(options: argparse.Namespace, compared: Compared) -> None:
    """By the processes that torchrun started; the first one has the rows."""
    local, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
    if CUDA:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    for mode in options.modes:
        try:
            found = measured(options, mode, rank, local, dist.get_world_size())
        except Exception as error:
            traceback.print_exc()
            found = failed(mode, dist.get_world_size(), f"{type(error).__name__}: {error}")
        if rank == 0:
            compared.add(*found)
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    compared = Compared(options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        by_launcher(options, compared)
    else:
        started_here(options, compared)
    if compared.rows:
        show(compared.rows)
        if predicted := compared.predicted():
            print("\nby scale_model.py, not run:")
            show(predicted)
        with contextlib.suppress(ImportError):
            scale_model.draw(compared.rows, options.output / "scale.png")
        about = shapes.about()
        print(f"\n{about['gpu']}; {about['versions']}; {about['date']}: {options.output}")


if __name__ == "__main__":
    main()
