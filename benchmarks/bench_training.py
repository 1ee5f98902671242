"""What the frozen half of an initialised adapter costs in training.

    make bench-training

Training steps (forward, backward, AdamW) of a model with random weights of a real shape, three
adapters in turn: PEFT's plain LoRA of rank r, which is what ``filet.write_residual`` leaves; the
same after ``filet.apply_statistics``, of rank 2r with one half frozen; and plain LoRA with a
second, frozen adapter active beside it, another way to subtract a start. Which directions were
chosen is nothing to the time, so the statistics are of random vectors. Medians of steps, the better
of two rounds. Written to --output: training_<shape>….csv.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

import filet
import shapes
from bench_syrk import write
from filet import FiletConfig
from recipes import random_statistics
from shapes import CUDA, DEVICE, SHAPES, synchronize

GIB = 2**30
ROUNDS, WARM, STEPS = 2, 3, 6
KINDS = ("plain", "FILet", "a second adapter")


def adapted(kind: str, args: argparse.Namespace) -> PeftModel:
    model = shapes.build(SHAPES[args.shape], args.blocks)
    peft_model = get_peft_model(
        model, shapes.lora_config(args.rank), autocast_adapter_dtype=args.autocast
    )
    if kind == "FILet":
        config = FiletConfig(start="untouched", scaling="singular", normalization="mean")
        filet.apply_statistics(peft_model, random_statistics(peft_model), config)
    if kind == "a second adapter":
        peft_model.add_adapter("second", shapes.lora_config(args.rank))
        peft_model.base_model.set_adapter(["default", "second"])
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".second." not in name)
    if args.checkpointing:
        peft_model.enable_input_require_grads()
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return peft_model.train()


def measure(kind: str, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a step, and GiB at the peak."""
    model = adapted(kind, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    run: Any = torch.compile(model) if args.compile else model
    batches = shapes.token_batches(
        SHAPES[args.shape], 4 * args.batch_size, args.length, args.batch_size
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(WARM + STEPS):
        batch = shapes.on_device(batches[step % 4])
        synchronize()
        start = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.autocast):
            loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if CUDA else float("nan")
    return 1e3 * sorted(times[WARM:])[STEPS // 2], peak


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--blocks", type=int, default=8 if CUDA else 2)
    parser.add_argument("--rank", type=int, default=32 if CUDA else 4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048 if CUDA else 16)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--autocast", action="store_true", help="adapters in float32, autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind in KINDS:
            found[kind].append(measure(kind, args))
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
            torch._dynamo.reset()
    least = min(ms for ms, _ in found["plain"])
    options = [name for name in ("checkpointing", "autocast", "compile") if getattr(args, name)]
    rows = []
    for kind, runs in found.items():
        ms, peak = min(ms for ms, _ in runs), max(peak for _, peak in runs)
        rows.append(
            {
                "adapter": kind, "shape": args.shape, "blocks": args.blocks, "rank": args.rank,
                "batch": f"{args.batch_size} x {args.length}", "options": " ".join(options),
                "ms": f"{ms:.1f}", "ratio": f"{ms / least:.3f}", "peak GiB": f"{peak:.2f}",
                **shapes.about(),
            }
        )  # fmt: skip
        print(f"{kind:<18}{ms:9.1f} ms  x {ms / least:.3f}  {peak:6.2f} GiB", flush=True)
    name = "_".join(["training", args.shape, f"r{args.rank}", f"b{args.batch_size}", *options])
    write(rows, args.output / f"{name}.csv")


if __name__ == "__main__":
    main()
