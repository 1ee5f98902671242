"""Quadratic forms and energies on a GPU: quadform_diag against the library's product.

    make bench-quadform

Every row: correctness against float64 first; then all implementations in turn, as in bench_syrk.py.
Effective TFLOP/s count the operations of the full product, 2 n² p, whatever is skipped. Two ratios
to the library, the better of eager and compiled: from the same inputs, S in float32 as a second
moment is, and with S rounded to bfloat16 beforehand, untimed, for the library alone. Then
fisher_energies for all seven linear layers of a transformer block. Written:
quadform.csv, energies.csv and quadform.png in --output.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_syrk import CUDA, SQUARE, memory, time_in_turn, write
from filet_kernels import Moments, fisher_energies, quadform_diag
from filet_kernels.quadform import BACKENDS, backend_of

# n, p, and what the project asks of "fast": times the better library's, effective TFLOP/s.
ROWS = [
    (4096, 4096, 1.9, 1220),
    (4096, 14336, 1.9, 1200),
    (8192, 8192, 2.05, 1320),
    (14336, 14336, 1.95, 1270),
]
SMALL = [(256, 256, 0.0, 0), (256, 600, 0.0, 0)]
ACCURATE = 3.2  # times "fast", at most

# Hidden size, size of k and v, size of the MLP, and what is asked of a block, in milliseconds.
MODELS = {"Llama-3-8B": (4096, 1024, 14336, 15.0), "Llama-3-70B": (8192, 1024, 28672, 110.0)}
TINY = {"tiny, no statement on speed": (64, 16, 200, float("nan"))}
DEVICE = torch.device("cuda" if CUDA else "cpu")

EAGER, COMPILED = "(V * (S16 @ V)).sum(0)", "the same, torch.compile"
CAST, CAST_COMPILED = "S.bfloat16() and the same", "that, torch.compile"
PRODUCT = "S16 @ V alone"
LIBRARY = (EAGER, COMPILED, CAST, CAST_COMPILED)
FAST, FAST_FP32 = "fast, V bf16", "fast, V fp32"
BF16, FP32 = "accurate, V bf16", "accurate, V fp32"


def library(S16: Tensor, V: Tensor) -> Tensor:
    return (V * (S16 @ V)).sum(0)


def from_float32(S: Tensor, V: Tensor) -> Tensor:
    return library(S.bfloat16(), V)


def operands(n: int, p: int) -> tuple[Tensor, Tensor]:
    """A second moment of n tokens, and V in float32."""
    X = torch.randn(n, n, device=DEVICE).bfloat16()
    S = torch.mm(X.T, X, out_dtype=torch.float32) if CUDA else X.T.float() @ X.float()
    return torch.tril(S) + torch.tril(S, -1).T, torch.randn(n, p, device=DEVICE)


def implementations(S: Tensor, V: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed; the first is ours as it is chosen."""
    S16, V16 = S.bfloat16(), V.bfloat16()
    chosen = backend_of(S, V)
    others = [name for name in BACKENDS[:2] if CUDA and name == "triton" != chosen]
    runs: dict[str, Callable[[], Any]] = {}
    for label, v in ((FAST, V16), (FAST_FP32, V), (BF16, V16), (FP32, V)):
        precision = label.partition(",")[0]
        for name in (chosen, *others):
            runs[f"{name}, {label}"] = lambda name=name, v=v, p=precision: quadform_diag(  # type: ignore[misc]
                S, v, precision=p, backend=name
            )
    runs[EAGER] = lambda: library(S16, V16)
    if CUDA:
        compiled = torch.compile(library, dynamic=False)
        runs[COMPILED] = lambda: compiled(S16, V16)
    runs[CAST] = lambda: from_float32(S, V16)
    if CUDA:
        cast_compiled = torch.compile(from_float32, dynamic=False)
        runs[CAST_COMPILED] = lambda: cast_compiled(S, V16)
    runs[PRODUCT] = lambda: S16 @ V16
    if CUDA:
        square = torch.randn(8192, 8192, device=DEVICE).bfloat16()
        runs[SQUARE] = lambda: square @ square
    return runs


def errors(S: Tensor, V: Tensor, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Largest error over |v|ᵀ|S||v| in some columns, of everything that gives forms."""
    columns = torch.arange(0, V.shape[1], max(V.shape[1] // 61, 1), device=DEVICE)
    found = {}
    for name, run in runs.items():
        if name in (PRODUCT, SQUARE):
            continue
        v = V[:, columns]
        v = (v if name.endswith("V fp32") else v.bfloat16()).double()
        truth = (v * (S.double() @ v)).sum(0)
        magnitude = (v.abs() * (S.double().abs() @ v.abs())).sum(0)
        found[name] = float(((run()[columns].double() - truth).abs() / magnitude).max())
        bound = 5e-7 if "accurate" in name else 3 * 2.0**-8
        assert found[name] <= bound or name in LIBRARY, (name, found[name])
    return found


def forms(rounds: int, about: dict[str, str]) -> list[dict[str, Any]]:
    records = []
    for n, p, ratio, rate in ROWS if CUDA else SMALL:
        S, V = operands(n, p)
        runs = implementations(S, V)
        error = errors(S, V, runs)
        mebibytes = {name: memory(run) for name, run in runs.items()}
        times = time_in_turn(runs, rounds)
        operations = 2 * n**2 * p
        chosen = backend_of(S, V)
        beforehand, same = (
            min(times[name][1] for name in names if name in times)
            for names in ((EAGER, COMPILED), (CAST, CAST_COMPILED))
        )
        limit = operations / 2 / (2 * 8192**3) * times[SQUARE][1] if CUDA else float("nan")
        print(
            f"\nn={n}, p={p}; asked of fast: {ratio} × the better library's, {rate} TFLOP/s; "
            f"of accurate: at most {ACCURATE} × fast"
        )
        print(
            "ms (p50), TFLOP/s, × library from the same inputs, with S rounded beforehand, × fast "
            "from the same inputs, share of limit, error, MiB"
        )
        for name, (p20, p50, p80) in times.items():
            work = 2 * 8192**3 if name == SQUARE else operations
            fast = f"{chosen}, {FAST_FP32 if name.endswith('V fp32') else FAST}"
            record = {
                "n": n, "p": p, "implementation": name, "p20_ms": p20, "p50_ms": p50,
                "p80_ms": p80, "effective_TFLOPs": work / p50 / 1e9, "times_library": same / p50,
                "times_library_S_rounded_beforehand": beforehand / p50,
                "times_fast": p50 / times[fast][1], "share_of_limit": limit / p50,
                "error": error.get(name, float("nan")), "MiB": mebibytes[name], **about,
            }  # fmt: skip
            records.append(record)
            print(
                f"{name:28} {p50:8.3f} {record['effective_TFLOPs']:6.0f} {same / p50:6.2f} "
                f"{beforehand / p50:6.2f} "
                f"{record['times_fast']:6.2f} {limit / p50:6.2f} {record['error']:8.1e} "
                f"{mebibytes[name]:8.1f}",
                flush=True,
            )
        del S, V, runs
    return records


def block(hidden: int, kv: int, mlp: int) -> dict[str, tuple[Tensor, Moments]]:
    """W in bfloat16 and moments of 4096 tokens of each layer, those of one input shared."""
    shapes = {
        "q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden),
        "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp),
    }  # fmt: skip
    layers: dict[str, tuple[Tensor, Moments]] = {}
    for name, (m, n) in shapes.items():
        leader = {"k": "q", "v": "q", "up": "gate"}.get(name)
        shared = layers[leader][1].input if leader else None
        moments = Moments.zeros((m, n), device=DEVICE, input=shared)
        for side in (moments.input, moments.output):
            if side is not shared:
                side.update(torch.randn(4096, side.sum.shape[0], device=DEVICE).bfloat16())
        layers[name] = (torch.randn(m, n, device=DEVICE).bfloat16() / n**0.5, moments)
    return layers


def energies(rounds: int, about: dict[str, str]) -> list[dict[str, Any]]:
    records = []
    for model, (hidden, kv, mlp, asked) in (MODELS if CUDA else TINY).items():
        layers = block(hidden, kv, mlp)
        runs: dict[str, Callable[[], Any]] = {
            name: lambda layer=layer: fisher_energies(*layer)  # type: ignore[misc]
            for name, layer in layers.items()
        }
        error, mebibytes = {}, {}
        for name, (W, moments) in layers.items():
            truth = fisher_energies(W.double(), moments)
            error[name] = float(((runs[name]() - truth) / truth).abs().max())
            del truth
            mebibytes[name] = memory(runs[name])
            assert error[name] <= 1e-4, (name, error[name])
        singles = list(runs.values())
        runs["block"] = lambda singles=singles: [run() for run in singles]  # type: ignore[misc]
        error["block"], mebibytes["block"] = max(error.values()), max(mebibytes.values())
        times = time_in_turn(runs, rounds)
        print(f"\nfisher_energies, {model}, W bf16, accurate; asked of a block: {asked} ms")
        print("layer, W, smaller moment (MiB), ms (p50), MiB allocated, error against float64")
        for name, (p20, p50, p80) in times.items():
            shape = tuple(layers[name][0].shape) if name in layers else ()
            moment = min(shape) ** 2 / 2**18 if shape else float("nan")
            records.append(
                {
                    "model": model, "layer": name, "shape": "×".join(map(str, shape)),
                    "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "smaller_moment_MiB": moment,
                    "MiB": mebibytes[name], "error": error[name], **about,
                }
            )  # fmt: skip
            print(
                f"{name:6} {records[-1]['shape']:12} {moment:8.0f} {p50:8.3f} "
                f"{mebibytes[name]:8.1f} {error[name]:8.1e}",
                flush=True,
            )
        del layers, runs, singles
    return records


def plot(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["n"], r["p"]) for r in records))
    names = [
        name
        for name in dict.fromkeys(r["implementation"] for r in records)
        if name not in (SQUARE, CAST, CAST_COMPILED)
    ]
    figure, axes = plt.subplots(figsize=(10, 4))
    for index, name in enumerate(names):
        rates = [
            next(
                r["effective_TFLOPs"]
                for r in records
                if (r["n"], r["p"]) == shape and r["implementation"] == name
            )
            for shape in shapes
        ]
        places = [k + (index - len(names) / 2) * 0.8 / len(names) for k in range(len(shapes))]
        axes.bar(places, rates, width=0.8 / len(names), label=name, align="edge")
    axes.set_xticks(range(len(shapes)), [f"n {n}\np {p}" for n, p in shapes])
    axes.set_ylabel("effective TFLOP/s (2 n² p per call)")
    axes.set_title(f"diag(VᵀSV), S float32: {records[0]['gpu']}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-forms", action="store_true", help="the energies only")
    parser.add_argument("--no-energies", action="store_true", help="the quadratic forms only")
    options = parser.parse_args()
    about = {
        "gpu": torch.cuda.get_device_name()
        if CUDA
        else "no GPU: small shapes, and no statement on speed",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    print(f"{about['gpu']}; {about['versions']}; {options.rounds} rounds")
    if not options.no_forms:
        records = forms(options.rounds, about)
        write(records, options.output / "quadform.csv")
        plot(records, options.output / "quadform.png")
    if not options.no_energies:
        write(energies(options.rounds, about), options.output / "energies.csv")
    print(f"wrote to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
