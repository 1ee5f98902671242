"""The blockwise engine on Llama-3-70B's shapes: seconds a block, the head, memory, waiting.

    make bench-blockwise

The real thing, with random weights: some blocks and the head, 320 samples of 512 tokens. A host
block or two stand for all blocks, made before anything is timed: they are copied through the same
pinned buffers as shards in the page cache are, and cross the bus as often. What is said of 80
blocks is extrapolated: a block's seconds, the median without the first block of each sweep, times
80, and what comes once. On a CPU it runs small shapes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from filet import FiletConfig
from filet.blockwise import Blockwise
from filet.shards import Entry, entries

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


class Cycle:
    """Random weights on the host: a few blocks, given for all in turn, and all of the rest."""

    def __init__(self, blocks: int, model: nn.Module) -> None:
        self.blocks = blocks
        self._made: dict[str, Tensor] = {}
        for entry in entries(model):
            if self._key(entry) not in self._made:
                self._made[self._key(entry)] = self._random(entry)

    def _key(self, entry: Entry) -> str:
        parts = entry.names[0].split(".")
        return ".".join(str(int(p) % self.blocks) if p.isdigit() else p for p in parts)

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor]]:
        for entry in wanted:
            yield entry, self._made[self._key(entry)]

    def _random(self, entry: Entry) -> Tensor:
        if len(entry.shape) == 1:
            return torch.ones(entry.shape, dtype=entry.dtype)
        generator = torch.Generator("cuda" if CUDA else "cpu").manual_seed(len(self._made))
        value = torch.empty(entry.shape, dtype=entry.dtype, device=generator.device)
        return value.normal_(0, entry.shape[-1] ** -0.5, generator=generator).cpu()

    def identity(self) -> dict[str, Any]:
        return {"random": self.blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="blocks to run (default: 8)")
    parser.add_argument("--cycle", type=int, default=2, help="blocks on the host (default: 2)")
    parser.add_argument("--samples", type=int, default=320 if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--host-memory", type=float, default=48 if CUDA else 1, help="GiB")
    parser.add_argument("--scratch", type=Path, help="folder for what that does not hold")
    parser.add_argument("--folder", type=Path, help="where the run folder goes (a fast disk)")
    args = parser.parse_args()

    shapes = LARGE if CUDA else SMALL
    config = LlamaConfig(
        **shapes, num_hidden_layers=args.blocks, max_position_embeddings=args.length,
        tie_word_embeddings=False,
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    source = Cycle(args.cycle, model)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(-(-args.samples // args.batch_size)):
        ids = torch.randint(shapes["vocab_size"], (args.batch_size, args.length),
                            generator=generator)  # fmt: skip
        batches.append({"input_ids": ids, "labels": ids})
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    name = torch.cuda.get_device_name() if CUDA else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}; {args.blocks} blocks of {shapes}")
    if not CUDA:
        print("no GPU: small shapes, whose times mean nothing")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Blockwise(
            model, source, batches, lora, FiletConfig(samples=args.samples),
            device=device, run_folder=Path(folder) / "run",
            host_memory=int(args.host_memory * 2**30), scratch=args.scratch,
        )  # fmt: skip
        with run:
            run.sweep()
            arenas = run.pool.made
    assert run.plan is not None
    seconds = run.seconds
    sweeps = ("forward", "head", "reverse")
    steady = {
        sweep: statistics.median(each[1:] or each) for sweep, each in run.block_seconds.items()
    }
    both = sum(steady.values())
    for sweep, each in run.block_seconds.items():
        print(
            f"{sweep:<17}{steady[sweep]:8.3f} s a block, steady; each: "
            + " ".join(f"{value:.2f}" for value in each)
        )
    print(f"both             {both:8.3f} s a block, steady (H100: floor {FLOOR}, goal 1.9)")
    whole = sum(seconds[sweep] for sweep in sweeps)
    for sweep in sweeps:
        print(
            f"{sweep + ' in all':<17}{seconds[sweep]:8.3f} s "
            f"(planned {run.plan.seconds[sweep]:.3f})"
        )
    planned = sum(run.plan.seconds.values())
    off = 100 * (planned / whole - 1)
    print(f"planned          {planned:8.3f} s, took {whole:.3f} s: {off:+.1f} % (within 15 wanted)")
    goals = {"weights": " (the goal is 5)", "memory": " (page-locking, once)", "disk": ""}
    for what, value in run.waited.items():
        print(f"waited: {what:<9}{value:8.3f} s, {100 * value / whole:.1f} %{goals[what]}")
    # What the blocks took beyond the steady seconds, and the head, grow with no block.
    once = {
        "preparing": seconds["preparing"],
        "head": seconds["head"],
        **{f"{s} besides": seconds[s] - args.blocks * steady[s] for s in ("forward", "reverse")},
    }
    print("once             " + ", ".join(f"{key} {value:.3f} s" for key, value in once.items()))
    print(f"host memory      {arenas * run.layout.nbytes / 2**30:8.2f} GiB in {arenas} arenas")
    if CUDA:
        peak, planned = torch.cuda.max_memory_allocated(), run.plan.device_bytes
        print(
            f"GPU memory       {peak / 2**30:8.2f} GiB at the peak (planned {planned / 2**30:.2f}, "
            "goal 20)"
        )
    extrapolated = DEPTH * both + sum(once.values())
    weights, boundary = run.waited["weights"], run.layout.nbytes / 2**30
    print(
        f"{DEPTH} blocks        {extrapolated:8.0f} s, extrapolated, not run: "
        f"{DEPTH} × {both:.3f} s + {sum(once.values()):.3f} s once; the wait for weights, where it "
        f"comes before each sweep only, would be {100 * weights / extrapolated:.1f} %; given room "
        f"for {DEPTH} boundaries of {boundary:.2f} GiB, or a scratch disk that keeps up"
    )


if __name__ == "__main__":
    main()
