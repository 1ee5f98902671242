"""The model benchmarks on tiny shapes, the recipes they time, and how a profile is read."""

from __future__ import annotations

import csv
import importlib.util
import json
import re

import pytest
import torch
import transformers

import bench_blockwise
import bench_contrast
import bench_methods
import bench_model
import bench_scale
import recipes
import shapes
from oracle import factors, fisher_energies
from ranks import run, values

CUDA = torch.cuda.is_available()
SMALL = ["--samples", "8", "--length", "24", "--batch-size", "4", "--rank", "8"]


def matrix(m: int, n: int) -> tuple[torch.Tensor, ...]:
    """W (m, n) in float32 with distinct singular values, and its triplets in float64."""
    generator = torch.Generator().manual_seed(m * n)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    sigma = torch.linspace(4.0, 1.0, len(sigma), dtype=torch.float64)
    W = (U @ torch.diag(sigma) @ Vh).float()
    return W, *torch.linalg.svd(W.double(), full_matrices=False)


# The recipes. They compute in float32: singular vectors are good to a few times 2⁻²⁴ σ_max over the
# gap between singular values, here 4 and at least 0.2. Measured: up to 1.2e-6.


@pytest.mark.parametrize(("m", "n"), [(12, 20), (30, 12)])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_milora_takes_the_smallest_triplets(m, n, scaling):
    W, U, sigma, Vh = matrix(m, n)
    A, B, residual = recipes.milora(W, 4, scaling)
    assert A.shape == (4, n) and B.shape == (m, 4)
    truth = U[:, -4:] @ torch.diag(sigma[-4:]) @ Vh[-4:]
    torch.testing.assert_close(scaling * (B @ A).double(), truth, atol=5e-6, rtol=0)
    torch.testing.assert_close((residual + scaling * B @ A).double(), W.double(), atol=5e-7, rtol=0)
    # Balanced: A and B carry the same share of each singular value.
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), atol=2e-6, rtol=0)


def test_dash_takes_the_directions_of_the_largest_relative_change():
    W, U, sigma, Vh = matrix(16, 24)
    delta = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    rates = torch.diag(U.T @ delta.double() @ Vh.T).abs() / sigma
    chosen = rates.argsort(descending=True)[:5]
    left, right = recipes.dash_directions(W, delta, count=5)
    ones = torch.ones(5, dtype=torch.float64)  # up to the sign
    torch.testing.assert_close((U[:, chosen] * left).sum(0).abs(), ones, atol=2e-6, rtol=0)
    torch.testing.assert_close((Vh[chosen] * right).sum(1).abs(), ones, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
def test_filet_as_written_is_algorithm_1(m, n):
    W = matrix(m, n)[0]
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(50, n, generator=generator), torch.randn(50, m, generator=generator)
    energies = fisher_energies(W, x, g)
    A_true, B_true, W_true = factors(W, energies, 4, 1.5)
    A, B, residual = recipes.filet_as_written(W, x.T @ x / 50, g.T @ g / 50, 4, 1.5)
    # The fourth and fifth energy are 0.6% apart and more. Measured: up to 2e-7.
    torch.testing.assert_close(A.double(), A_true, atol=1e-6, rtol=0)
    torch.testing.assert_close(B.double(), B_true, atol=1e-6, rtol=0)
    torch.testing.assert_close(residual.double(), W_true, atol=1e-6, rtol=0)
    torch.testing.assert_close(residual + 1.5 * B @ A, W, atol=5e-7, rtol=0)


def test_statistics_as_written_are_those_of_each_layers_own_vectors(one_thread):
    model = shapes.build(shapes.SHAPES["tiny"], 2)
    layers = shapes.linears(model, 1)
    assert len(layers) == 7
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def capture(name):
        def hook(module, args, output):
            seen[name].append(args[0].detach().flatten(0, 1).double())
            output.register_hook(lambda g: seen[name].append(g.flatten(0, 1).double()))

        return hook

    for name, module in layers.items():
        module.register_forward_hook(capture(name))
    hooks = recipes.AsWritten(layers)
    batches = shapes.token_batches(shapes.SHAPES["tiny"], 4, 16, 2)
    bench_model.bare(model, batches)
    hooks.remove()
    bench_model.bare(model, batches[:1])  # no longer counted
    for name, (S_X, S_Y) in hooks.sums.items():
        x, g = seen[name][:4:2], seen[name][1:4:2]
        # bfloat16 products are exact in float32; sums of 64 terms err by about 1e-6 of the largest.
        for total, rows in ((S_X, x), (S_Y, g)):
            truth = sum(v.T @ v for v in rows)
            error = (total.double() - truth).abs().max() / truth.abs().max()
            assert error < 1e-5, (name, error)


# The shapes.


@pytest.mark.parametrize(
    ("key", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("qwen-8b", 8_190_735_360),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_a_shape_has_the_parameters_that_its_model_card_says(key, parameters):
    shape = shapes.SHAPES[key]
    with torch.device("meta"):
        model = getattr(transformers, f"{shape.family}ForCausalLM")(shape.config(1))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - block
    assert rest + shape.blocks * block == parameters
    layers = shapes.linears(model, 1)
    sizes = {name.rpartition(".")[2]: tuple(m.weight.shape) for name, m in layers.items()}
    assert sizes == shape.linears()


def test_a_twin_has_the_same_weights_and_none_of_the_hooks():
    model = shapes.build(shapes.SHAPES["tiny"], 1)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    twin = shapes.twin(model)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert not set(map(id, model.modules())) & set(map(id, twin.modules()))


# The profile.


def trace():
    """A chrome trace as torch's profiler writes it for a GPU; thread 1 forward, 2 backward."""
    events = []

    def operator(name, thread, start, stop, dims=()):
        args = {"Input Dims": list(dims)}
        event = {"ph": "X", "cat": "cpu_op", "name": name, "tid": thread, "ts": start}
        events.append(event | {"dur": stop - start, "args": args})

    def launch(name, thread, at, start, stop, cat="kernel"):
        correlation = len(events)
        events.append(
            {
                "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": thread,
                "ts": at, "dur": 1, "args": {"correlation": correlation},
            }
        )  # fmt: skip
        events.append(
            {
                "ph": "X", "cat": cat, "name": name, "tid": 7, "ts": start, "dur": stop - start,
                "args": {"correlation": correlation},
            }
        )  # fmt: skip

    operator("aten::linear", 1, 0, 10)
    operator("aten::mm", 1, 2, 8)
    launch("nvjet_tst_128x256", 1, 4, 100, 200)
    operator("UnroundedLinear", 1, 20, 60)
    operator("aten::mm", 1, 22, 28)
    launch("nvjet_tst_64x64", 1, 24, 200, 210)
    operator("aten::mul", 1, 30, 36)
    launch("vectorized_elementwise_kernel", 1, 32, 210, 230)
    operator("filet_kernels::syrk_", 1, 40, 50)
    launch("some_kernel", 1, 44, 230, 270)
    operator("aten::scaled_dot_product_attention", 1, 70, 80)
    launch("pytorch_flash::flash_fwd_kernel", 1, 75, 270, 280)
    operator("aten::to", 1, 90, 95, dims=[[8, 64, 256]])
    launch("unrolled_elementwise_kernel", 1, 92, 280, 300)
    operator("aten::add", 1, 96, 99, dims=[[8, 64, 64]])
    launch("vectorized_elementwise_kernel", 1, 97, 300, 301)
    launch("Memcpy HtoD", 1, 99.5, 290, 310, cat="gpu_memcpy")
    operator("autograd::engine::evaluate_function: MmBackward0", 2, 100, 120)
    operator("aten::mm", 2, 105, 110)
    launch("nvjet_tst_128x256", 2, 106, 400, 500)
    operator("autograd::engine::evaluate_function: UnroundedLinearBackward", 2, 130, 150)
    operator("UnroundedLinearBackward", 2, 131, 149)
    operator("aten::mul", 2, 140, 145)
    launch("vectorized_elementwise_kernel", 2, 142, 500, 520)
    operator("aten::add_", 2, 149.2, 149.8)  # of gradients that meet
    launch("vectorized_elementwise_kernel", 2, 149.5, 530, 532)
    launch("mystery", 9, 160, 520, 530)
    return {"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}


def test_kernels_are_put_to_what_launched_them():
    found = bench_model.kernels(trace())
    assert [kernel.start for kernel in found] == sorted(kernel.start for kernel in found)
    own = {"UnroundedLinear": "y/h conversions", "UnroundedLinearBackward": "y/h conversions"}
    kinds: dict[str, float] = {}
    for kernel in found:
        kind = bench_model.category(kernel, 256, own)
        kinds[kind] = kinds.get(kind, 0) + kernel.duration
    assert kinds == {
        "products, forward": 110,
        "products, backward": 100,
        "y/h conversions": 40,
        "filet_kernels::syrk_": 40,
        "attention": 10,
        "loss": 20,
        "elementwise and reductions": 3,
        "memory copies": 20,
        "other": 10,
    }
    # 100-310 and 400-532: what overlaps counts once.
    assert bench_model.busy(found) == 342
    text = bench_model.summary(found, 256, 1, 0.5, True)
    assert text.startswith("12 kernels a batch")
    assert "busy 0.34 ms a batch; first to last 0.43 ms under the profiler: idle 20.8%" in text
    assert "0.50 ms without it: idle 31.6%" in text


def test_the_librarys_own_functions_are_known():
    own = bench_model.own_functions()
    assert own["UnroundedLinear"] == own["UnroundedLinearBackward"] == "y/h conversions"
    assert own["_RMSNorm"] == own["_RMSNormBackward"] == "norms, gates, positions"


# The scripts.


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore")  # PEFT's and the profiler's
def test_bench_model(tmp_path, capsys, one_thread):
    options = ["--shape", "tiny", *SMALL, "--rounds", "1", "--paper", "--profile"]
    bench_model.main([*options, "--output", str(tmp_path)])
    written = rows(tmp_path / "model_tiny.csv")
    assert [row["what"] for row in written] == [
        "(a) bare forward and backward",
        "(a) with fused norms and gates",
        "floor: that + syrk_ alone",
        "(b) collect_statistics",
        "(c) initialize",
        "(c) scaled to 320 samples",
        "the paper's statistics as written",
    ]
    base = float(written[0]["ms_a_batch"])
    for row in written:
        assert float(row["times_bare"]) == pytest.approx(float(row["ms_a_batch"]) / base)
        assert row["gpu"] and row["versions"] and row["date"]
    # Two blocks; moments of q/k/v (shared), o, gate/up and down, x or y and g or h: 32² for k and
    # v's output side, 64² for the rest.
    size = 2 * 4 * (2 * 32**2 + 9 * 64**2)
    assert float(written[0]["statistics_GiB"]) * 2**30 == size
    profile = (tmp_path / "profile_tiny.txt").read_text()
    assert "filet_kernels::syrk_" in profile and "products, forward" in profile
    assert (tmp_path / "profile_tiny.json.gz").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "tiny, no statement on speed" in printed
    assert CUDA or "no GPU" in printed


@pytest.mark.filterwarnings("ignore")
def test_bench_methods(tmp_path, capsys, one_thread):
    options = ["--shapes", "tiny", *SMALL, "--limit", "600", "--output", str(tmp_path)]
    bench_methods.main(options)
    written = {row["method"]: row for row in rows(tmp_path / "methods.csv")}
    assert list(written) == [title for title, _, _ in bench_methods.METHODS.values()]
    for title, row in written.items():
        if title == "CorDA" and importlib.util.find_spec("attr") is None:
            assert row["note"].startswith("ModuleNotFoundError: ") and not row["extra_seconds"]
            continue
        assert row["extra_seconds"], row["note"]
        measured, blocks = int(row["blocks_measured"]), int(row["blocks"])
        assert 1 <= measured <= blocks == 2
        assert row["note"].startswith("scaled") == (
            measured < blocks or 0 < int(row["samples_measured"]) < 8
        )
    assert float(written["FILet, ours"]["times_filet"]) == 1
    assert (tmp_path / "methods.png").stat().st_size > 0
    assert CUDA or "no GPU" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_bench_blockwise(tmp_path, capsys, one_thread, monkeypatch):
    monkeypatch.setattr(bench_blockwise, "CUDA", False)  # small shapes on a GPU's machine, too
    boundary = 2 * 8 * 16 * 64 * 2  # bytes: two batches of 8 × 16 tokens of width 64 in bfloat16
    options = ["--blocks", "3", "--samples", "16", "--length", "16"]
    options += ["--folder", str(tmp_path), "--shards", str(tmp_path / "model")]
    bench_blockwise.main([*options, "--trace", str(tmp_path / "trace.json.gz")])
    printed = capsys.readouterr().out
    # Three blocks, the embedding, the head; as transformers finds them.
    index = json.loads((tmp_path / "model" / bench_blockwise.INDEX).read_text())
    files = {path.name: path for path in (tmp_path / "model").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files) and len(files) == 5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert set(index["weight_map"]) == set(model.state_dict())
    assert model.config.num_hidden_layers == 3 and model.dtype == torch.bfloat16
    assert "made and written in" in printed and "GB/s" in printed
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert re.search(r"trace +[\d.]+ s; computing [\d.]+%, HtoD 0.0% of the time", printed)
    assert re.search(r"3 of 3 kept, .*k = 1, .*recomputed 0 blocks", printed)
    for what in ("forward", "reverse", "waited: weights", "bus and disk", "adapter", "80 blocks"):
        assert what in printed, what

    # Too little memory for the inputs of four blocks: two boundaries to work with, two that are
    # kept and one between.
    host = ["--host-memory", str((2 + 2 + 1) * boundary / 2**30)]
    bench_blockwise.main([*options, "--blocks", "4", "--shards", str(tmp_path / "four"), *host])
    printed = capsys.readouterr().out
    assert re.search(r"2 of 4 kept, .*k = 2, .*recomputed 1 blocks", printed)
    # Every kept but the topmost one costs k - 1 blocks: 39 for 80, and 63 for the least memory.
    assert "39 × " in printed and "63 × " in printed

    # The same files again.
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    bench_blockwise.main(options)
    assert "already" in capsys.readouterr().out
    assert before == {name: path.stat().st_mtime_ns for name, path in files.items()}
    with pytest.raises(SystemExit, match="num_hidden_layers = 3; expected 5"):
        bench_blockwise.main([*options, "--blocks", "5"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(SystemExit, match="holds no model"):
        bench_blockwise.main([*options, "--shards", str(tmp_path / "other")])


def test_a_method_that_fails_or_takes_too_long_says_so():
    def fails(case):
        raise ValueError("no such thing\nand more")

    def hangs(case):
        while True:
            pass

    case = bench_methods.Case(shapes.SHAPES["tiny"], 8, 16, 4, 8, 1, 1)
    assert bench_methods.attempt(fails, case, 60) == "ValueError: no such thing"
    stopped = bench_methods.attempt(hangs, case, 0.01)
    assert stopped == "TimeLimit: stopped at the limit of 0.01 s"


def test_contrast_against_all_eigenvectors(tmp_path, capsys, one_thread):
    bench_contrast.main(["--shape", "tiny", "--rank", "8", "--output", str(tmp_path)])
    assert re.search(r"tiny, .*, 2 blocks, rank 8: \d+\.\d\d s", capsys.readouterr().out)
    with open(tmp_path / "contrast.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layers"] for row in rows] == ["q, k, v", "o", "gate, up", "down"]
    assert [row["space"] for row in rows] == ["x", "x", "x", "y"]
    for row in rows:
        assert row["size"] == "64" and float(row["first eigenvalue"]) > float(
            row["last eigenvalue"]
        )
        # Both in float64; the eigenvalues at the cut are some percent apart.
        assert float(row["angle"]) < 1e-7 and float(row["eigenvalues"]) < 1e-8


@pytest.mark.parametrize("script", [bench_model, bench_methods])
def test_options_that_do_not_fit_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--samples", "10", "--batch-size", "4"])
    assert "--samples 10 must be a multiple of --batch-size 4" in capsys.readouterr().err
    if not CUDA:
        option = "--shape" if script is bench_model else "--shapes"
        with pytest.raises(SystemExit):
            script.main([option, "llama-1b"])
        assert "need" in capsys.readouterr().err


def scale_on(rank, folder, options, modes):
    return [bench_scale.measured(options, mode, rank, rank, 2) for mode in modes]


@pytest.mark.skipif(CUDA, reason="each of its processes takes a GPU")
def test_bench_scale(tmp_path, capsys, one_thread):
    options = bench_scale.arguments(
        ["--blocks", "2", "--samples", "8", "--batch-size", "2", "--output", str(tmp_path)]
    )
    one = [bench_scale.measured(options, mode, 0, 0, 1) for mode in ("data", "blockwise")]
    many, nothing = values(run(2, scale_on, tmp_path, options, options.modes))
    assert [row["mode"] for row, _ in many] == [*options.modes]
    assert nothing[2][1] == {}  # blocks' files are the first process's
    compared = bench_scale.Compared(options)
    for row, energies in (*one, *many, bench_scale.failed("fsdp2", 4, "Traceback\nOSError: no")):
        compared.add(row, energies)
    data, blockwise, *two, failure = compared.rows
    for first, second in ((data, two[0]), (data, two[1]), (blockwise, two[2])):
        assert first["speedup"] == 1 and first["difference"] == 0
        assert second["speedup"] == first["seconds"] / second["seconds"]
        assert second["efficiency"] == second["speedup"] / 2
        assert 0 < second["difference"] < 1e-4
    assert failure == {"mode": "fsdp2", "processes": 4, "error": "OSError: no"}
    assert two[0]["reduce_s"] > 0 == data["reduce_s"]
    assert abs(two[2]["host_GiB"] / blockwise["host_GiB"] - 0.5) < 0.01
    assert_memory_of(two[1])
    written = json.loads((tmp_path / "scale.json").read_text())
    assert written["rows"] == json.loads(json.dumps(compared.rows)) and written["about"]["versions"]
    assert_predicted(compared.rows, written["predicted"])
    bench_scale.show(compared.rows)
    bench_scale.scale_model.draw(compared.rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 0
    said = capsys.readouterr().out
    for what in ("data parallel", "FSDP2", "blockwise", "waited_processes_%", "error OSError: no"):
        assert what in said


def assert_memory_of(row):
    """Of the tiny shape in bfloat16: half the model, all moments in float32, one block."""
    shape, rank = shapes.SHAPES["tiny"], 32
    linears = shape.linears().values()
    block = sum(m * n + rank * (m + n) for m, n in linears) + 2 * shape.hidden
    model = 2 * block + 2 * shape.vocabulary * shape.hidden + shape.hidden
    assert row["block_GiB"] * 2**30 == 2 * block
    assert row["part_GiB"] * 2**30 == pytest.approx(model, rel=1e-3)  # two bytes, halved
    assert row["moments_GiB"] * 2**30 == 2 * 4 * (2 * 32**2 + 9 * 64**2)
    parts = sum(row[f"{name}_GiB"] for name in ("part", "moments", "block"))
    assert row["expected_GiB"] == pytest.approx(parts)


def assert_predicted(rows, found):
    """By the measured pieces, and nothing where one was not measured."""
    model, needed = bench_scale.scale_model, bench_scale.scale_model.NEEDED
    assert [(row["model"], row["processes"]) for row in found] == [
        *(("tiny, no statement on speed", count) for count in (1, 2, 4, 8)),
        ("Llama-3.1-405B", 8),
    ]
    one = next(r for r in rows if r["mode"] == "blockwise" and r["processes"] == 1)
    two = next(r for r in rows if r["mode"] == "blockwise" and r["processes"] == 2)
    first, _, _, eight, large = found
    assert first["tokens_s"] == one["tokens_s"] and first["reduce_s"] == 0
    assert eight["tokens_s"] == one["tokens_s"] / 8 and eight["reduce_s"] == two["reduce_s"]
    assert found[1]["measured_block_s"] == two["seconds"] and eight["measured_block_s"] == needed
    # A block's weights are read twice, beside what is computed.
    computed = eight["tokens_s"] + eight["selection_s"] + eight["reduce_s"]
    assert eight["block_s"] == max(computed, 2 * eight["load_s"]) + eight["disk_s"]
    assert large["all_s"] == 126 * large["block_s"]
    tiny = shapes.SHAPES["tiny"]
    alone = [row for row in rows if row["processes"] == 1]
    lacking = model.predicted(alone, tiny, shapes.LARGEST, 8)
    assert lacking["reduce_s"] == lacking["block_s"] == lacking["all_s"] == needed
    assert lacking["tokens_s"] == large["tokens_s"]
    assert set(model.predicted([], tiny, tiny, 2).values()) == {tiny.title, 2, needed}
    others = [row for row in rows if row["mode"] != "blockwise"]
    assert others and model.table(others, tiny, [shapes.LARGEST], 8) == []


@pytest.mark.skipif(CUDA, reason="each of its processes takes a GPU")
@pytest.mark.parametrize("limit", ["200", "0.2"])
def test_bench_scale_loses_no_mode_by_another(limit, tmp_path, capsys, monkeypatch):
    """Its own processes; one mode fails, or all take too long."""
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "something").touch()
    argv = ["--blocks", "2", "--samples", "4", "--batch-size", "2", "--processes", "1"]
    argv += ["--modes", "blockwise", "data", "--shards", str(folder), "--limit", limit]
    monkeypatch.setenv("PYTHONPATH", "benchmarks:python:.")
    bench_scale.main([*argv, "--output", str(tmp_path)])
    blockwise, data = json.loads((tmp_path / "scale.json").read_text())["rows"]
    if limit == "200":
        assert "error" in blockwise and "seconds" in data
    else:
        assert "not done after 0 s (--limit)" in blockwise["error"] == data["error"]
    assert "error" in capsys.readouterr().out
