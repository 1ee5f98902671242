"""Second moments on a GPU: syrk_ against the library's product, for the shapes of docs/kernels.md.

    make bench-syrk

Every row: correctness against float64 first; then all implementations in turn, round after round,
in an order drawn anew each time, so that they meet the same clocks: what follows a long product at
the power limit is up to 10% slower than what follows one that waits for memory. Before every call
the L2 cache is filled with other data, which are read: written, they would have to be written back
during the call. Times are medians of CUDA events. Effective TFLOP/s count the operations of the
full product, 2 T n², whatever is skipped. The limit is half of these operations at the rate of an
8192³ bfloat16 product that takes its turn in the same rounds. Written: syrk.csv and syrk.png in
--output.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from filet_kernels import syrk_
from filet_kernels.syrk import BACKENDS, backend_of

# n, T, and what the project asks of each: times the library's accumulation, effective TFLOP/s.
ROWS = [
    (1024, 4096, 1.5, 480),
    (1024, 16384, 1.5, 710),
    (2048, 4096, 1.6, 860),
    (2048, 16384, 1.45, 1030),
    (4096, 4096, 2.1, 1130),
    (4096, 16384, 1.95, 1300),
    (8192, 4096, 2.3, 1200),
    (8192, 16384, 2.1, 1360),
    (14336, 8192, 2.1, 1280),
]
SMALL = [(256, 512, 0.0, 0), (512, 1024, 0.0, 0)]
CUDA = torch.cuda.is_available()
BASELINE = "C.add_(mm → fp32)"
SQUARE = "8192³ mm"


def library(X: Tensor) -> Tensor:
    """XᵀX in float32, as the library gives it."""
    return torch.mm(X.T, X, out_dtype=torch.float32) if CUDA else X.T.float() @ X.float()


def implementations(C: Tensor, X: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed; the last three overwrite instead of accumulating."""
    chosen = backend_of(C, X)
    runs: dict[str, Callable[[], Any]] = {
        f"syrk_ ({chosen})": lambda: syrk_(C, X),
        f"syrk_ ({chosen}, any order)": lambda: syrk_(C, X, deterministic=False),
    }
    if CUDA:
        others = [name for name in BACKENDS[:2] if name != chosen]
        for name in others:
            try:
                syrk_(torch.zeros_like(C), X, backend=name)
            except ValueError:
                continue
            runs[f"syrk_ ({name})"] = lambda name=name: syrk_(C, X, backend=name)  # type: ignore
    runs[BASELINE] = lambda: C.add_(library(X))
    out32, out16 = torch.empty_like(C), torch.empty_like(C, dtype=X.dtype)
    if CUDA:
        runs["mm → fp32 (overwrites)"] = lambda: torch.mm(
            X.T, X, out_dtype=torch.float32, out=out32
        )
    runs["mm → bf16 (overwrites)"] = lambda: torch.mm(X.T, X, out=out16)
    return runs


def check(X: Tensor) -> tuple[float, float]:
    """Largest error over sqrt(G_ii G_jj) in some columns: of syrk_, and of the library."""
    n = X.shape[1]
    C = torch.zeros(n, n, device=X.device)
    syrk_(C, X)
    columns = torch.tensor([0, 1, n // 3, n // 2, n - 1], device=X.device)
    exact = X.double().T @ X[:, columns].double()
    diagonal = X.double().square().sum(0)
    scale = torch.sqrt(diagonal.unsqueeze(1) * diagonal[columns].unsqueeze(0))
    below = torch.arange(n, device=X.device).unsqueeze(1) >= columns.unsqueeze(0)
    ours = ((C[:, columns].double() - exact).abs() / scale)[below].max().item()
    theirs = ((library(X)[:, columns].double() - exact).abs() / scale)[below].max().item()
    # A float32 sum of T terms errs by about sqrt(T) 2⁻²⁴ of them.
    assert ours <= 2 * theirs + X.shape[0] ** 0.5 * 2**-23, (ours, theirs)
    return ours, theirs


def time_in_turn(
    runs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """p20, p50 and p80 of each, in milliseconds."""
    flush = torch.zeros(64 << 20 if CUDA else 0, device="cuda" if CUDA else "cpu")  # 256 MiB
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    for _ in range(rounds + 2):
        events = {}
        order.shuffle(names)
        if CUDA:  # 2.6 ms of work, in which the host gets ahead and stays there
            for _ in range(30):
                flush.sum()
        for name in names:
            flush.sum()
            if CUDA:  # no wait in between: the host's own time is not measured
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                runs[name]()
                stop.record()
                events[name] = (start, stop)
            else:
                begin = time.perf_counter()
                runs[name]()
                times[name].append(1e3 * (time.perf_counter() - begin))
        if CUDA:
            torch.cuda.synchronize()
            for name, (start, stop) in events.items():
                times[name].append(start.elapsed_time(stop))
    return {name: quantiles(values[2:]) for name, values in times.items()}  # two to warm up


def quantiles(values: list[float]) -> tuple[float, float, float]:
    tenths = statistics.quantiles(values, n=10)
    return tenths[1], statistics.median(values), tenths[7]


def memory(run: Callable[[], Any]) -> float:
    """MiB that a call allocates on top of its operands."""
    if not CUDA:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    gpu = (
        torch.cuda.get_device_name() if CUDA else "no GPU: small shapes, and no statement on speed"
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{gpu}; {versions}; {options.rounds} rounds")
    records, rows = [], ROWS if CUDA else SMALL
    head = (
        "n, T, TFLOP/s, × baseline, asked (×, TFLOP/s), share of limit, any order, error, library's"
    )
    print(head + ", MiB (baseline's)")
    for n, tokens, ratio, rate in rows:
        X = torch.randn(tokens, n, device=device).bfloat16()
        C = torch.zeros(n, n, device=device)
        error, library_error = check(X)
        runs = implementations(C, X)
        mebibytes = {name: memory(run) for name, run in runs.items()}
        if CUDA:
            square = torch.randn(8192, 8192, device=device).bfloat16()
            runs[SQUARE] = lambda square=square: square @ square  # type: ignore[misc]
        times = time_in_turn(runs, options.rounds)
        operations = 2 * tokens * n**2
        limit = operations / 2 / (2 * 8192**3) * times[SQUARE][1] if CUDA else float("nan")
        for name, (p20, p50, p80) in times.items():
            work = 2 * 8192**3 if name == SQUARE else operations
            records.append(
                {
                    "n": n, "T": tokens, "implementation": name, "p20_ms": p20, "p50_ms": p50,
                    "p80_ms": p80, "effective_TFLOPs": work / p50 / 1e9,
                    "times_baseline": times[BASELINE][1] / p50, "share_of_limit": limit / p50,
                    "MiB": mebibytes.get(name, float("nan")), "gpu": gpu, "versions": versions,
                }
            )  # fmt: skip
        ours, free = list(times)[:2]
        best, loose, base = times[ours][1], times[free][1], times[BASELINE][1]
        print(
            f"{n}, {tokens}, {operations / best / 1e9:.0f}, {base / best:.2f}, ({ratio}, {rate}), "
            f"{limit / best:.2f}, {operations / loose / 1e9:.0f}, {error:.1e}, "
            f"{library_error:.1e}, {mebibytes[ours]:.1f} ({mebibytes[BASELINE]:.0f})",
            flush=True,
        )
    write(records, options.output / "syrk.csv")
    plot(records, options.output / "syrk.png")
    print(f"wrote {options.output}/syrk.csv and syrk.png", file=sys.stderr)


def write(records: list[dict[str, Any]], path: Path) -> None:
    """As CSV, columns as in the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["n"], r["T"]) for r in records))
    names = [
        name
        for name in dict.fromkeys(r["implementation"] for r in records)
        if name != SQUARE and "any order" not in name
    ]
    figure, axes = plt.subplots(figsize=(10, 4))
    for index, name in enumerate(names):
        rates = [
            next(
                (r["effective_TFLOPs"] for r in records if (r["n"], r["T"]) == s
                 and r["implementation"] == name), 0.0,
            )
            for s in shapes
        ]  # fmt: skip
        places = [k + (index - len(names) / 2) * 0.8 / len(names) for k in range(len(shapes))]
        axes.bar(places, rates, width=0.8 / len(names), label=name, align="edge")
    axes.set_xticks(range(len(shapes)), [f"n {n}\nT {t}" for n, t in shapes])
    axes.set_ylabel("effective TFLOP/s (2 T n² per call)")
    axes.set_title(f"XᵀX, bfloat16 in, float32 sums: {records[0]['gpu']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
