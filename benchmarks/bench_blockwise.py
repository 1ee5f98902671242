"""The blockwise engine on Llama-3-70B's shapes: seconds a block, the head, memory, waiting.

    make bench-blockwise

The real thing, with random weights: some blocks and the head, 320 samples of 512 tokens. A host
block or two stand for all blocks: they are copied through the same pinned buffers as shards in the
page cache are, and cross the bus as often. What is said of 80 blocks is extrapolated: a block's
seconds times 80, and the head. On a CPU it runs small shapes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from filet import FiletConfig
from filet.blockwise import Blockwise
from filet.shards import Entry

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
    """Random weights of a few blocks on the host, given for all blocks in turn."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._made: dict[str, Tensor] = {}

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[tuple[Entry, Tensor]]:
        for entry in wanted:
            parts = entry.names[0].split(".")
            key = ".".join(str(int(p) % self.blocks) if p.isdigit() else p for p in parts)
            if key not in self._made:
                self._made[key] = self._random(entry)
            yield entry, self._made[key]

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
    source = Cycle(args.cycle)
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
            waited = run.stream.settle()
    assert run.plan is not None
    seconds = run.seconds
    forward, reverse = (seconds[phase] / args.blocks for phase in ("forward", "reverse"))
    whole = sum(seconds[phase] for phase in ("forward", "head", "reverse"))
    print(f"forward          {forward:8.3f} s a block")
    print(f"reverse          {reverse:8.3f} s a block")
    print(f"both             {forward + reverse:8.3f} s a block (H100: floor {FLOOR}, goal 1.9)")
    print(f"head             {seconds['head']:8.3f} s")
    print(f"before the run   {seconds['preparing']:8.3f} s")
    print(f"planned          {sum(run.plan.seconds.values()):8.3f} s, took {whole:.3f} s")
    print(f"waited: weights  {waited:8.3f} s, {100 * waited / whole:.1f} % (the goal is 5)")
    print(
        f"waited: disk     {run.waited_for_disk:8.3f} s, {100 * run.waited_for_disk / whole:.1f} %"
    )
    if CUDA:
        peak, planned = torch.cuda.max_memory_allocated(), run.plan.device_bytes
        print(
            f"GPU memory       {peak / 2**30:8.2f} GiB at the peak (planned {planned / 2**30:.2f})"
        )
    extrapolated = DEPTH * (forward + reverse) + seconds["head"]
    print(f"extrapolated to {DEPTH} blocks: {extrapolated:.0f} s (not run)")


if __name__ == "__main__":
    main()
