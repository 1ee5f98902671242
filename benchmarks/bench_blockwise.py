"""The blockwise engine on Llama-3-70B's shapes: seconds a block, the head, memory, waiting.

    make bench-blockwise
    make bench-blockwise BENCH_ARGS="--shards DIR"                          # from real files
    make bench-blockwise BENCH_ARGS="--shards DIR --host-memory 18"         # some blocks recomputed

The real thing, with random weights: some blocks and the head, 320 samples of 512 tokens. With
``--shards`` they are a model's folder, written to DIR unless it is there, and read from the page
cache as ``filet.initialize_folder`` reads any model. Without, a host block or two stand for all
blocks, made before anything is timed: they are copied through the same pinned buffers, and cross
the bus as often. What is said of 80 blocks is extrapolated: a block's seconds, the median without
the first block of each sweep, times 80, and what comes once. On a CPU it runs small shapes, whose
times mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from bench_model import busy, kernels
from filet import FiletConfig
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import empty_model
from filet.blockwise.weights import ShardedWeights, WeightSource
from filet.model.checkpoint import Entry, entries, shard_files
from filet.model.folder import quantization_of

CUDA = torch.cuda.is_available()
DEPTH = 80  # blocks of the real model
FLOOR = 1.48  # s a block on an H100: forward 11.5 ms, and 25.5 ms forward and back, 40 times
LARGE = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INDEX = "model.safetensors.index.json"
WRITERS = 4  # shards that are made at a time, each of up to 2.1 GB in host memory and on the GPU
READERS = 8
SWEEPS = ("forward", "head", "reverse")


def random(entry: Entry, seed: int) -> Tensor:
    if len(entry.shape) == 1:
        return torch.ones(entry.shape, dtype=entry.dtype)
    generator = torch.Generator("cuda" if CUDA else "cpu").manual_seed(seed)
    value = torch.empty(entry.shape, dtype=entry.dtype, device=generator.device)
    return value.normal_(0, entry.shape[-1] ** -0.5, generator=generator).cpu()


class Cycle:
    """Random weights on the host: a few blocks, given for all in turn, and all of the rest."""

    def __init__(self, blocks: int, model: nn.Module) -> None:
        self.blocks = blocks
        self._made: dict[str, Tensor] = {}
        for entry in entries(model):
            if self._key(entry) not in self._made:
                self._made[self._key(entry)] = random(entry, len(self._made))

    def _key(self, entry: Entry) -> str:
        parts = entry.names[0].split(".")
        return ".".join(str(int(p) % self.blocks) if p.isdigit() else p for p in parts)

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor]]:
        for entry in wanted:
            yield entry, self._made[self._key(entry)]

    def made_with(self, entry: Entry) -> str | None:
        return None

    def identity(self) -> dict[str, Any]:
        return {"random": self.blocks}


def write_model(folder: Path, config: LlamaConfig, model: nn.Module) -> None:
    """Random weights of ``model`` as a folder that transformers loads, unless it is there.

    A shard for each block, one for the embedding, one for the head. The index comes last: with it
    the folder is complete.
    """
    settings = folder / "config.json"
    if settings.is_file():
        there = json.loads(settings.read_text())
        for key in [*LARGE, "num_hidden_layers"]:
            if there.get(key) != getattr(config, key):
                raise SystemExit(
                    f"{folder} holds a model with {key} = {there.get(key)}; expected "
                    f"{getattr(config, key)}, or a folder that is not there"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty and holds no model; expected a new folder")
    if (folder / INDEX).is_file():
        print(f"shards           in {folder} already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    parts: dict[str, list[Entry]] = {}
    for entry in entries(model):
        name = entry.names[0]
        block = name.split(".")[2] if ".layers." in name else "head"
        parts.setdefault("embedding" if "embed_tokens" in name else block, []).append(entry)
    paths = [
        folder / f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        for number in range(len(parts))
    ]

    def write(number: int, part: Sequence[Entry]) -> None:
        tensors = {
            entry.names[0]: random(entry, 1000 * number + index) for index, entry in enumerate(part)
        }
        save_file(tensors, paths[number], {"format": "pt"})

    def sync(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(WRITERS) as pool:
        start = time.perf_counter()
        list(pool.map(write, range(len(parts)), parts.values()))
        written = time.perf_counter()
        # What is still on its way to the disk would be in the way of what the run writes.
        list(pool.map(sync, paths))
        synced = time.perf_counter()
    size = sum(path.stat().st_size for path in paths)
    names = {
        entry.names[0]: path.name
        for path, part in zip(paths, parts.values(), strict=True)
        for entry in part
    }
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    print(
        f"shards           {size / 1e9:8.1f} GB in {len(paths)} files made and written in "
        f"{written - start:.1f} s, on the disk {synced - written:.1f} s later (not part of the run)"
    )


def read_once(folder: Path) -> None:
    """Every shard, so that all are in the page cache."""

    def read(path: Path) -> int:
        buffer, size = bytearray(2**24), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size

    with ThreadPoolExecutor(READERS) as pool:
        for what in ("first", "again"):
            start = time.perf_counter()
            size = sum(pool.map(read, shard_files(folder)))
            seconds = time.perf_counter() - start
            print(
                f"read {what:<12}{seconds:8.2f} s, {size / seconds / 1e9:.1f} GB/s by {READERS} "
                "threads (not part of the run)"
            )


def token_batches(args: argparse.Namespace, vocabulary: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(-(-args.samples // args.batch_size)):
        ids = torch.randint(vocabulary, (args.batch_size, args.length), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    return batches


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="blocks to run (default: 8)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--shards", type=Path, metavar="DIR",
        help="read the weights from a model's folder, written to DIR if it is not there (18 GB "
        "for 8 blocks)",
    )  # fmt: skip
    weights.add_argument("--cycle", type=int, default=2, help="blocks on the host (default: 2)")
    parser.add_argument(
        "--quantize", choices=("nf4", "fp4", "int8"),
        help="quantise the weights of --shards as they stream, by bitsandbytes",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=320 if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--host-memory", type=float, default=48 if CUDA else 1, help="GiB")
    parser.add_argument("--scratch", type=Path, help="folder for what that does not hold")
    parser.add_argument("--folder", type=Path, help="where the run folder goes (a fast disk)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json.gz",
        help="also a chrome trace; of fewer samples, it grows with them",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.quantize and not args.shards:
        parser.error("--quantize is of --shards")
    return args


def weights_of(args: argparse.Namespace, shapes: LlamaConfig) -> tuple[nn.Module, WeightSource]:
    """The model without its weights, and where these come from."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16).eval()
    if not args.shards:
        return model, Cycle(args.cycle, model)
    write_model(args.shards, shapes, model)
    read_once(args.shards)
    config = quantization_of(args.shards, args.quantize) if args.quantize else None
    model = empty_model(args.shards, quantization_config=config)
    return model, ShardedWeights(args.shards, model)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    shapes = LARGE if CUDA else SMALL
    config = LlamaConfig(
        **shapes, num_hidden_layers=args.blocks, max_position_embeddings=8192,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    name = torch.cuda.get_device_name() if CUDA else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}; {args.blocks} blocks of {shapes}")
    if not CUDA:
        print("no GPU: small shapes, whose times mean nothing")
    model, source = weights_of(args, config)
    if CUDA:
        torch.cuda.empty_cache()
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Blockwise(
            model, source, token_batches(args, shapes["vocab_size"]), lora,
            FiletConfig(samples=args.samples),
            device=torch.device("cuda", 0) if CUDA else torch.device("cpu"),
            run_folder=Path(folder) / "run",
            host_memory=int(args.host_memory * 2**30), scratch=args.scratch,
        )  # fmt: skip
        with run:
            if args.trace:
                traced(run, args.trace)
            else:
                run.sweep()
            if args.shards:
                start = time.perf_counter()
                run.write(Path(folder) / "adapter")
                print(f"adapter          {time.perf_counter() - start:8.3f} s to write its folder")
    show(run, args.blocks)


def traced(run: Blockwise, path: Path) -> None:
    """The sweeps under the profiler: what the device computes, and what copies run beside it."""
    activity = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run.sweep()
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        found = kernels(json.load(file))
    begin = (
        found[0].start + 1e6 * run.times.seconds["preparing"]
    )  # without the measuring for the plan
    found = [kernel for kernel in found if kernel.start >= begin]
    computing = [kernel for kernel in found if not kernel.copy]
    elapsed = max(kernel.start + kernel.duration for kernel in found) - found[0].start
    lines = [f"trace            {elapsed / 1e6:8.3f} s; computing {busy(computing) / elapsed:.1%}"]
    for what in ("HtoD", "DtoH"):
        copies = [kernel for kernel in found if kernel.copy and what in kernel.name]
        both = sorted(computing + copies, key=lambda kernel: kernel.start)
        alone = busy(both) - busy(computing)
        lines.append(
            f"{what} {busy(copies) / elapsed:.1%} of the time, {alone / elapsed:.1%} alone"
        )
    print(", ".join(lines))


def show(run: Blockwise, blocks: int) -> None:
    steady = {
        sweep: statistics.median(each[1:] or each or [0.0])
        for sweep, each in run.times.blocks.items()
    }
    show_blocks(run, steady)
    show_sweeps(run)
    once = besides(run, blocks, steady)
    print("once             " + ", ".join(f"{key} {value:.3f} s" for key, value in once.items()))
    show_memory(run)
    show_extrapolated(run, steady, sum(once.values()))


def show_blocks(run: Blockwise, steady: dict[str, float]) -> None:
    """Seconds a block of each sweep, what was kept, and how fast weights came."""
    assert run.plan is not None and run.boundaries is not None
    plan, times = run.plan, run.times.blocks
    for sweep, each in times.items():
        if each:
            print(
                f"{sweep:<17}{steady[sweep]:8.3f} s a block, steady; each: "
                + " ".join(f"{value:.2f}" for value in each)
            )
    both = steady["forward"] + steady["reverse"]
    print(f"both             {both:8.3f} s a block, steady (H100: floor {FLOOR}, goal 1.9)")
    boundary = run.boundaries.layout.nbytes / 2**30
    print(
        f"boundaries       {plan.kept} of {plan.blocks[1]} kept, of {boundary:.2f} GiB: k = "
        f"{plan.stride}, {plan.on_disk} of them on the disk; recomputed "
        f"{len(times['recomputed'])} blocks in {sum(times['recomputed']):.3f} s"
    )
    # By the host, the last block of the reverse sweep; with what the copies waited for the GPU.
    entries_read = [each for entry in run.model.weights[run.model.first] for each in entry.stored]
    loaded = sum(each.nbytes for each in entries_read)
    print(
        f"loading          {run.stream.loading:8.3f} s, the last block, beside the computation: "
        f"{loaded / run.stream.loading / 1e9:.1f} GB/s"
    )


def show_sweeps(run: Blockwise) -> None:
    """Seconds of the sweeps, beside the plan's, and how much of them was waiting."""
    assert run.plan is not None
    planned, seconds, waited = run.plan.seconds, run.times.seconds, run.times.waited
    whole = sum(seconds[sweep] for sweep in SWEEPS)
    for sweep in SWEEPS:
        print(f"{sweep + ' in all':<17}{seconds[sweep]:8.3f} s (planned {planned[sweep]:.3f})")
    total = sum(planned.values())
    off = 100 * (total / whole - 1)
    print(f"planned          {total:8.3f} s, took {whole:.3f} s: {off:+.1f} % (within 15 wanted)")
    notes = {"memory": " (page-locking, once)"}
    for what, value in waited.items():
        print(f"waited: {what:<9}{value:8.3f} s, {100 * value / whole:.1f} %{notes.get(what, '')}")
    both = waited["weights"] + waited["disk"]
    print(f"bus and disk     {both:8.3f} s, {100 * both / whole:.1f} % (the goal is 5)")


def besides(run: Blockwise, blocks: int, steady: dict[str, float]) -> dict[str, float]:
    """Seconds that come once: the head, and what the blocks took beyond the steady seconds."""
    seconds = run.times.seconds
    again = len(run.times.blocks["recomputed"])
    reverse = blocks * steady["reverse"] + again * steady["recomputed"]
    return {
        "preparing": seconds["preparing"],
        "head": seconds["head"],
        "forward besides": seconds["forward"] - blocks * steady["forward"],
        "reverse besides": seconds["reverse"] - reverse,
    }


def show_memory(run: Blockwise) -> None:
    assert run.plan is not None and run.boundaries is not None
    arenas, boundary = run.boundaries.pool.made, run.boundaries.layout.nbytes / 2**30
    print(
        f"host memory      {arenas * boundary:8.2f} GiB in {arenas} arenas (planned "
        f"{run.plan.host_bytes / 2**30:.2f}, with what blocks are called with)"
    )
    if CUDA:
        print(
            f"GPU memory       {run.memory.most / 2**30:8.2f} GiB at the peak (planned "
            f"{run.plan.device_bytes / 2**30:.2f}, goal 20)"
        )


def show_extrapolated(run: Blockwise, steady: dict[str, float], once: float) -> None:
    """The real model's blocks. One that is recomputed costs the same for every k."""
    assert run.plan is not None and run.boundaries is not None
    plan, boundary = run.plan, run.boundaries.layout.nbytes / 2**30
    both = steady["forward"] + steady["reverse"]
    working = run.boundaries.keeping.arenas - (plan.kept - plan.on_disk) - (plan.stride - 1)
    strides = {1}
    if plan.recomputed:
        strides |= {plan.stride, min(range(1, DEPTH + 1), key=lambda k: -(-DEPTH // k) + k)}
    for k in sorted(strides):
        kept = -(-DEPTH // k)
        more = (kept - 1) * (k - 1)  # of the last stretch the forward sweep keeps everything
        extrapolated = DEPTH * both + more * steady["recomputed"] + once
        room = kept + k - 1 + working
        print(
            f"{DEPTH} blocks, k = {k:<4}{extrapolated:6.0f} s, extrapolated, not run: {DEPTH} × "
            f"{both:.3f} s + {more} × {steady['recomputed']:.3f} s recomputed + "
            f"{once:.3f} s once; host memory for {room} boundaries, "
            f"{room * boundary:.1f} GiB, less with a scratch disk that keeps up"
        )
        share = 100 * run.times.waited["weights"] / extrapolated
        print(f"{'':<17}{share:8.1f} % waiting for weights, if before each sweep only")


if __name__ == "__main__":
    main()
