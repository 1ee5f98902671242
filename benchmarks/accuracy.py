"""How close the identities are to Algorithm 1 of the paper, on a real model and real text.

    python benchmarks/accuracy.py [--model DIR] [--dtype bfloat16] [--device cpu]

Runs SmolLM2-135M over Python's language reference, captures x and g of every targeted layer in the
same pass that takes FILet's moments, and evaluates Algorithm 1 (``tests/oracle.py``) from them in
float64 with nothing shortened. Prints, for each kind of layer and each way to the energies, the
largest relative error of the selected energies and how many of the selected directions differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import filet  # noqa: E402
import oracle  # noqa: E402
import python_docs  # noqa: E402
import smollm2  # noqa: E402
from filet.data.samples import Sample  # noqa: E402
from filet.data.tokens import batches  # noqa: E402
from filet.model.targets import find_targets  # noqa: E402
from filet_kernels import fisher_energies, select  # noqa: E402

RANK = 32


@dataclass(frozen=True)
class Layer:
    """A layer's energies by each way, (n,) float64, of the summed loss."""

    name: str
    spaces: str  # of the two moments, "xg"
    truth: Tensor
    energies: dict[str, Tensor]

    def error(self, way: str) -> float:
        """The largest relative error among the directions that the truth selects."""
        chosen = select(self.truth, RANK)
        return float(((self.energies[way] - self.truth) / self.truth)[chosen].abs().max())

    def worst_error(self, way: str) -> float:
        """The largest relative error among all directions."""
        return float(((self.energies[way] - self.truth) / self.truth).abs().max())

    def differing(self, way: str) -> int:
        """How many of the selected directions the truth does not select."""
        truth = set(select(self.truth, RANK).tolist())
        return RANK - len(truth & set(select(self.energies[way], RANK).tolist()))


def prepare(
    folder: Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[PeftModel, list[dict[str, Tensor]]]:
    """The model with a LoRA adapter on all its linear layers, and 16 samples of 128 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = python_docs.split()["python_train"]
    samples = [Sample("\n\n".join(texts[i : i + 3]), None) for i in range(0, 48, 3)]
    data = batches(samples, tokenizer, max_length=128, batch_size=4)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return get_peft_model(model, config), data


def compare(
    peft_model: PeftModel, data: list[dict[str, Tensor]], fast: bool = True, every: int = 1
) -> Iterator[Layer]:
    """Yield the energies of the targeted layers, by Algorithm 1 and by the library.

    Of all blocks, or of one of ``every`` so many: Algorithm 1 takes most of the time.
    """
    targets, _ = find_targets(peft_model, "default")
    targets = {n: t for n, t in targets.items() if int(n.split(".")[2]) % every == 0}
    x: dict[str, list[Tensor]] = {name: [] for name in targets}
    g: dict[str, list[Tensor]] = {name: [] for name in targets}

    def capture(name: str) -> list[Any]:
        base = targets[name].base

        def gradient(module: Any, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: g[name].append(grad.detach().flatten(0, 1)))

        return [
            base.register_forward_pre_hook(
                lambda module, args: x[name].append(args[0].detach().flatten(0, 1))
            ),
            base.register_forward_hook(gradient),
        ]

    handles = [handle for name in targets for handle in capture(name)]
    statistics = filet.collect_statistics(peft_model, data, show_progress_bar=False)
    for handle in handles:
        handle.remove()
    for name, target in targets.items():
        moments = statistics.moments[name]
        counted = int(moments.input.count)
        inputs, gradients = torch.cat(x.pop(name)), torch.cat(g.pop(name))
        assert counted == inputs.shape[0], "the captured rows must be those that counted"
        energies = {
            "accurate": fisher_energies(target.weight, moments, normalization="sum"),
        }
        if fast:
            energies["fast"] = fisher_energies(
                target.weight, moments, normalization="sum", precision="fast"
            )
        truth = oracle.fisher_energies(target.weight, inputs, gradients)
        yield Layer(name, moments.input.space + moments.output.space, truth, energies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=smollm2.default_folder())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    folder = smollm2.prepare(options.model)
    peft_model, data = prepare(folder, getattr(torch, options.dtype), options.device)
    kinds: dict[str, list[Layer]] = {}
    for layer in compare(peft_model, data):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"SmolLM2-135M, {options.dtype}, {name}, torch {torch.__version__}, r={RANK}\n")
    ways = ("accurate", "fast")
    print("| layers | moments |" + "".join(f" {way}: error | differ |" for way in ways))
    print("| --- | --- |" + " --- | --- |" * len(ways))
    for kind, layers in kinds.items():
        cells = "".join(
            f" {max(layer.error(way) for layer in layers):.1e} |"
            f" {sum(layer.differing(way) for layer in layers)} of {RANK * len(layers)} |"
            for way in ways
        )
        print(f"| {len(layers)} × {kind} | {', '.join(layers[0].spaces)} |{cells}")


if __name__ == "__main__":
    main()
