"""QLoRA: FILet on a 4-bit base against a bare forward and backward of it by bitsandbytes.

    make bench-qlora

Random weights of a real shape, quantised by bitsandbytes (bfloat16 inside), random tokens. In turn,
round after round, after one that warms up: (a) forward and backward of the bare quantised model, by
the library alone; (b) ``filet.collect_statistics``; (c) the energies, choice and writing of all
layers, ``filet.apply_statistics`` of what (b) took; and before (c) the energies by themselves, of
weights dequantised one by one, where the moments are on the GPU. Times are medians of the host's
clock with the device idle at both ends; memory is the peak over the weights. ``--cap GIB`` is all
the memory that the process may have from the start on
(``torch.cuda.set_per_process_memory_fraction``): whether a card of that size does it. The moments
that do not fit then are taken in several passes, and (c) has them in host memory. Written to
--output: qlora_<shape>….csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import get_peft_model
from torch import nn

import filet
import shapes
from bench_model import bare, timed
from bench_syrk import write
from filet.model.targets import find_targets
from filet_kernels import fisher_energies
from shapes import CUDA, DEVICE, DTYPE, LINEARS, SAMPLES, SHAPES

GIB = 2**30


def quantise(model: nn.Module, kind: str, double: bool) -> None:
    """Replace the blocks' linear layers by bitsandbytes', one by one. Mutates ``model``."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name not in LINEARS:
                continue
            new = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=DTYPE,
                quant_type=kind,
                device="meta",
            )
            new.weight = Params4bit(
                linear.weight.data, quant_type=kind, compress_statistics=double
            ).to(DEVICE)
            setattr(parent, name, new.eval())


def build(options: argparse.Namespace) -> Any:
    """The model, its blocks made and quantised one by one: a small card never has them whole."""
    model: Any = shapes.build(SHAPES[options.shape], 1)
    plain, blocks = model.model.layers[0], nn.ModuleList()
    for number in range(options.blocks):
        block = copy.deepcopy(plain)
        for parameter in block.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        block.self_attn.layer_idx = number
        quantise(block, options.kind, options.double_quant)
        blocks.append(block)
    model.model.layers, model.config.num_hidden_layers = blocks, options.blocks
    model.is_loaded_in_4bit = True  # PEFT looks there
    if options.checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def one_round(model: Any, batches: Any, options: argparse.Namespace) -> dict[str, float]:
    """(a), (b) and (c) in turn: seconds, and GiB over the weights."""
    found: dict[str, float] = {}
    if not options.no_bare:
        found["bare"], found["bare peak"], _ = timed(lambda: bare(model, batches))
    peft_model = get_peft_model(model, shapes.lora_config(options.rank))
    config = filet.FiletConfig(samples=None, passes=options.passes)
    found["statistics"], found["statistics peak"], taken = timed(
        lambda: filet.collect_statistics(peft_model, batches, config, show_progress_bar=False)
    )
    sums = {id(s): s.sum for m in taken.moments.values() for s in (m.input, m.output)}.values()
    found["moments"] = sum(s.numel() * s.element_size() for s in sums) / GIB
    del sums
    targets = find_targets(peft_model, "default")[0]
    if all(m.input.sum.is_cuda == CUDA for m in taken.moments.values()):
        found["energies"], found["energies peak"], _ = timed(
            lambda: [fisher_energies(targets[name].weight, m) for name, m in taken.moments.items()]
        )
    found["apply"], found["apply peak"], report = timed(
        lambda: filet.apply_statistics(peft_model, taken, config)
    )
    found |= {"selection": report.seconds["selection"], "writing": report.seconds["writing"]}
    peft_model.unload()
    return found


def planned(model: Any, batches: Any, options: argparse.Namespace) -> Any:
    """What the library expects to need, and in how many passes it will go."""
    peft_model = get_peft_model(model, shapes.lora_config(options.rank))
    config = filet.FiletConfig(samples=options.samples, passes=options.passes)
    plan = filet.estimate(peft_model, batches[0], config, batch_size=options.batch_size)
    peft_model.unload()
    return plan


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--blocks", type=int, help="so many (default: all)")
    parser.add_argument("--kind", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--samples", type=int, default=SAMPLES if CUDA else 16)
    parser.add_argument("--length", type=int, default=512 if CUDA else 32)
    parser.add_argument("--batch-size", type=int, default=8 if CUDA else 4)
    parser.add_argument("--rank", type=int, default=32 if CUDA else 8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2, help="batches of the round that warms up")
    parser.add_argument("--passes", default="auto", help="over the data (default: what fits)")
    parser.add_argument("--cap", type=float, help="GiB that the process may have")
    parser.add_argument("--checkpointing", action="store_true", help="of gradients, in all three")
    parser.add_argument("--no-bare", action="store_true", help="not (a), which a cap may not hold")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args(argv)
    options.passes = options.passes if options.passes == "auto" else int(options.passes)
    options.blocks = options.blocks or SHAPES[options.shape].blocks
    if options.cap and not CUDA:
        parser.error("--cap needs a GPU")
    return options


def show(
    options: argparse.Namespace, found: dict[str, float], weights: float
) -> list[dict[str, Any]]:
    """Print the medians; the rows as the CSV has them."""
    count = options.samples // options.batch_size
    a = found.get("bare", float("nan"))
    rows = [("(a) bare forward and backward", a, found.get("bare peak", float("nan")))]
    rows.append(("(b) collect_statistics", found["statistics"], found["statistics peak"]))
    if "energies" in found:
        rows.append(("energies of all layers", found["energies"], found["energies peak"]))
    rows.append(("(c) apply_statistics", found["apply"], found["apply peak"]))
    rows.append(("energies and choice of (c)", found["selection"], float("nan")))
    rows.append(("(b) and (c)", found["statistics"] + found["apply"], float("nan")))
    print("\nseconds, ms a batch, × (a), GiB over the weights at the peak")
    for what, seconds, peak in rows:
        print(f"{seconds:8.3f} {1e3 * seconds / count:9.2f} {seconds / a:7.3f} {peak:8.2f}  {what}")
    print(
        f"of (c): writing {found['writing']:.3f} s; weights {weights:.2f} GiB, "
        f"moments {found['moments']:.2f} GiB",
        flush=True,
    )
    about = {**shapes.about(), "bitsandbytes": bitsandbytes.__version__}
    return [
        {
            "shape": options.shape, "blocks": options.blocks, "kind": options.kind,
            "double_quant": options.double_quant, "samples": options.samples,
            "length": options.length, "batch_size": options.batch_size, "rank": options.rank,
            "cap_GiB": options.cap, "checkpointing": options.checkpointing,
            "what": what, "seconds": seconds, "times_bare": seconds / a,
            "GiB_over_weights": peak, "weights_GiB": weights, "moments_GiB": found["moments"],
            **about,
        }
        for what, seconds, peak in rows
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    if options.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * GIB / total)
    about = shapes.about()
    print(
        f"{SHAPES[options.shape].title}: {options.blocks} blocks in {options.kind}"
        f"{', double quantisation' if options.double_quant else ''}"
        f"{', gradient checkpointing' if options.checkpointing else ''}, "
        f"{options.samples} samples × {options.length} tokens in batches of {options.batch_size}, "
        f"r={options.rank}"
        f"{f', {options.cap:g} GiB at most' if options.cap else ''}; {about['gpu']}; "
        f"{about['versions']}, bitsandbytes {bitsandbytes.__version__}; {about['date']}",
        flush=True,
    )
    model = build(options)
    weights = torch.cuda.memory_allocated() / GIB if CUDA else float("nan")
    shape, sizes = SHAPES[options.shape], (options.samples, options.length, options.batch_size)
    batches = shapes.token_batches(shape, *sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.cap:
            print(planned(model, batches, options), flush=True)
        if options.warm:
            one_round(model, batches[: options.warm], options)
        rounds = [one_round(model, batches, options) for _ in range(options.rounds)]
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    rows = show(options, found, weights)
    if CUDA:
        print(f"peak of the process: {torch.cuda.max_memory_allocated() / GIB:.2f} GiB allocated")
    name = f"qlora_{options.shape}{f'_{options.cap:g}gib' if options.cap else ''}"
    name += "_checkpointing.csv" if options.checkpointing else ".csv"
    write(rows, options.output / name)


if __name__ == "__main__":
    main()
