"""Directions of task against keep for every layer of a model: seconds, and error to all of it.

    make bench-contrast BENCH_ARGS="--shape llama-8b"

Random inputs with principal directions that decay, and channels that are much larger than the rest
(of the task and of what is kept in the same places); new ones for every block. A block has four
problems, as the selection solves them: the input of q, k and v, that of o, that of gate and up,
each in space "x", and down's in space "y". Seconds are of :func:`filet_kernels.contrast_directions`
alone, after one call that warms up. Of the first block each result is compared with all
eigenvectors of S₀^-½ S S₀^-½ in float64, by symmetric roots and in one piece: the sine of the
largest angle between the two spaces, and the largest relative difference of an eigenvalue. Written:
contrast.csv in --output.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from filet_kernels import SecondMoment, contrast_directions
from shapes import CUDA, DEVICE, DTYPE, SHAPES, Shape, about, synchronize

DAMPING = 1e-2
OUTLIERS = 4  # channels, of 50 times the rest


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    shape = SHAPES[arguments.shape]
    records = measured(shape, arguments.blocks or shape.blocks, arguments.rank, arguments.tokens)
    for record in records:
        print(", ".join(f"{key} {value}" for key, value in record.items()))
    seconds = sum(record["seconds of all blocks"] for record in records)
    print(f"{shape.title}, {records[0]['blocks']} blocks, rank {arguments.rank}: {seconds:.2f} s")
    print(", ".join(about().values()))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "contrast.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*records[0], *about()])
        writer.writeheader()
        writer.writerows({**record, **about()} for record in records)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b" if CUDA else "tiny")
    parser.add_argument("--blocks", type=int, help="of the model (default: all)")
    parser.add_argument("--rank", type=int, default=32 if CUDA else 8)
    parser.add_argument("--tokens", type=int, default=16384 if CUDA else 512)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    return parser


def problems(shape: Shape) -> dict[str, tuple[int, int]]:
    """(m, n) of the layer for which each problem of a block is solved."""
    linears = shape.linears()
    names = {"q, k, v": "q_proj", "o": "o_proj", "gate, up": "gate_proj", "down": "down_proj"}
    return {title: linears[name] for title, name in names.items()}


def measured(shape: Shape, blocks: int, rank: int, tokens: int) -> list[dict[str, Any]]:
    """A record a problem: seconds of all blocks, and of the first the errors."""
    records: list[dict[str, Any]] = []
    for number, (title, size) in enumerate(problems(shape).items()):
        seconds = []
        errors: dict[str, float] = {}
        for block in range(blocks):
            W, task, keep = operands(size, tokens, seed=100 * block + number)
            if block == 0:
                rows, values = contrast_directions(W, task, keep, rank, damping=DAMPING)
                errors = compared(W, task, keep, rows, values)
            synchronize()
            start = time.perf_counter()
            contrast_directions(W, task, keep, rank, damping=DAMPING)
            synchronize()
            seconds.append(time.perf_counter() - start)
        records.append(
            {
                "layers": title,
                "size": len(task.sum),
                "space": task.space,
                "blocks": blocks,
                "seconds of all blocks": round(sum(seconds), 3),
                "fastest ms": round(1e3 * min(seconds), 2),
                "slowest ms": round(1e3 * max(seconds), 2),
                **errors,
            }
        )
    return records


def operands(
    size: tuple[int, int], tokens: int, seed: int
) -> tuple[Tensor, SecondMoment, SecondMoment]:
    """W (m, n), and the float32 moments of task and keep in the space that a layer has."""
    m, n = size
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    W = (normal(m, n) / n**0.5).to(DTYPE)
    decay = torch.arange(1, n + 1, device=DEVICE) ** -0.5
    channels = torch.randperm(n, generator=generator, device=DEVICE)
    # Reflections mix the principal directions into all channels at little cost.
    mirrors = torch.nn.functional.normalize(normal(4, n), dim=1)
    found: list[SecondMoment] = []
    for _ in ("task", "keep"):
        X = normal(tokens, n) * (decay * (0.5 * normal(n)).exp())
        for mirror in mirrors:
            X -= torch.outer(X @ mirror, 2 * mirror)
        X = X[:, channels]
        X[:, :OUTLIERS] *= 50
        X = X.to(DTYPE)
        moment = SecondMoment.zeros("x" if n <= m else "y", min(m, n), device=DEVICE)
        moment.update(X if n <= m else X.float() @ W.float().T)
        found.append(moment)
    return W, found[0], found[1]


def compared(
    W: Tensor, task: SecondMoment, keep: SecondMoment, rows: Tensor, values: Tensor
) -> dict[str, float]:
    """Errors against all eigenvectors, and the gap at the cut, on which the angle depends."""
    S, S0 = (m.sum.double().tril() + m.sum.double().tril(-1).T for m in (task, keep))
    to_rows = torch.eye(len(S), dtype=S.dtype, device=S.device)
    if task.space == "y":  # to orthonormal coordinates of W's rows
        root = inverse_root(W.double() @ W.double().T)
        S, S0, to_rows = root @ S @ root, root @ S0 @ root, root @ W.double()
    S, S0 = S / S.diagonal().mean(), S0 / S0.diagonal().mean()
    root = inverse_root(S0 + DAMPING * torch.eye(len(S0), dtype=S.dtype, device=S.device))
    all_values, vectors = torch.linalg.eigh(root @ S @ root)
    all_values, rank = all_values.flip(0), len(values)
    truth = (root @ vectors.flip(1)[:, :rank]).T @ to_rows
    P, Q = (torch.linalg.qr(each.T)[0] for each in (truth, rows))
    off = torch.linalg.svdvals(Q - P @ (P.T @ Q))[0]
    return {
        "first eigenvalue": round(float(values[0]), 3),
        "last eigenvalue": round(float(values[-1]), 3),
        "gap at the cut": float(1 - all_values[rank] / all_values[rank - 1]),
        "angle": float(off),
        "eigenvalues": float((values / all_values[:rank] - 1).abs().max()),
    }


def inverse_root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return vectors * values.rsqrt() @ vectors.T


if __name__ == "__main__":
    main()
