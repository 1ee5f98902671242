import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from filet_kernels import syrk_, syrk_ragged_
from filet_kernels.extension import cuda_extension, why_no_extension
from filet_kernels.syrk import BACKENDS, backend_of, turns_on
from with_triton import NO_TRITON, needs_triton, skip_interpreter

CUDA = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = torch.finfo(torch.float32).eps
# The CUDA kernels and their sizes: csrc/include/filet/syrk.h.
PLANS = [("pairs", 0), *(("share", size) for size in (2, 3, 5, 8))]
PLANS += [("grid", columns) for columns in (128, 160, 192)]


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Each implementation that runs on the device; Triton's is interpreted on a CPU."""
    if request.param == "triton" and NO_TRITON:
        pytest.skip(NO_TRITON)
    if device.type == "cpu" and (request.param == "cuda" or (request.param == "triton" and CUDA)):
        pytest.skip("it needs a CUDA device")
    return request.param


def run(C, X, backend, **options):
    """syrk_ by this backend; the test is skipped for operands that the CUDA kernel refuses."""
    try:
        return syrk_(C, X, backend=backend, **options)
    except ValueError as error:
        if backend == "cuda" and "does not support" in str(error):
            pytest.skip(str(error))
        raise


def make(T, n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, n, generator=generator).to(dtype).to(device)


def check(C, X, *, start=None, alpha=1.0, weights=None, steps=1):
    """Lower triangle against float64, elementwise; above the diagonal nothing has moved.

    A float32 sum of T products errs by at most about T u Σ|w x_i x_j| ≤ T u sqrt(G_ii G_jj) with
    u = eps/2; sqrt(T) of that is what random signs leave. The library's float32 product of the
    same operands is the baseline.
    """
    X64 = X.double().reshape(-1, X.shape[-1])
    w64 = torch.ones(X64.shape[0], device=X.device, dtype=torch.float64)
    if weights is not None:
        w64 = weights.double().flatten()
        X64 = X64[w64 != 0]
        w64 = w64[w64 != 0]
    product = alpha * (X64.T * w64) @ X64
    start = torch.zeros_like(product) if start is None else start.double()
    truth = start + steps * product
    X32 = X64.float()
    baseline = (alpha * ((X32.T * w64.float()) @ X32).double() - product).abs()
    diagonal = steps * (X64.square() * w64.abs().unsqueeze(1)).sum(0) * abs(alpha)
    scale = torch.sqrt(diagonal.unsqueeze(0) * diagonal.unsqueeze(1)) + start.abs()
    floor = 4 * EPS * max(X64.shape[0], 1) ** 0.5 * scale + 1e-37
    error = (C.double() - truth).abs()
    bad = torch.tril(error > 2 * steps * baseline + floor)
    assert not bad.any(), (
        f"{int(bad.sum())} elements, first {bad.nonzero()[0].tolist()}: {error[bad][0].item()}"
    )
    above = torch.triu(torch.ones_like(C, dtype=torch.bool), 1)
    assert C[above].isnan().all(), "written above the diagonal"


def poisoned(n, device, value=0.0):
    """A C whose upper triangle is NaN: it must be neither read nor written."""
    C = torch.full((n, n), float("nan"), device=device)
    lower = torch.tril(torch.ones_like(C, dtype=torch.bool))
    return C.masked_fill_(lower, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, n",
    [(1, 1), (5, 1), (1, 7), (64, 33), (300, 513), (7, 1025), (1000, 136), (70, 264), (500, 640)],
)
def test_shapes(T, n, dtype, device, backend):
    X = make(T, n, dtype, device)
    C = poisoned(n, device)
    assert run(C, X, backend) is C
    check(C, X)


def test_no_rows_leave_C_as_it_is(device, backend):
    C = poisoned(128, device, value=3.0)
    X = torch.empty(4, 0, 128, device=device, dtype=torch.bfloat16)
    run(C, X[0], backend)
    assert (C[torch.tril(torch.ones(128, 128, device=device)) > 0] == 3.0).all()
    if backend != "cuda":
        run(C, X, backend, weights=torch.empty(4, 0, device=device))
        assert (C[torch.tril(torch.ones(128, 128, device=device)) > 0] == 3.0).all()
        run(torch.empty(0, 0, device=device), torch.empty(5, 0, device=device), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [21, 144])
def test_accumulates_onto_C_with_alpha(dtype, n, device, backend):
    X = make(40, n, dtype, device)
    C = poisoned(n, device, value=2.5)
    run(C, X, backend, alpha=0.25)
    check(C, X, start=torch.full((n, n), 2.5, device=device), alpha=0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "int", "float"])
@pytest.mark.parametrize("T, n", [(50, 19), (300, 200)])
def test_weights_and_nan_in_uncounted_rows(dtype, kind, T, n, device, backend):
    X = make(T, n, dtype, device)
    weights = torch.arange(T, device=device) % 3
    weights = {"bool": weights != 0, "int": weights, "float": weights * 0.3}[kind]
    X[weights == 0] = float("nan")
    C = poisoned(n, device)
    run(C, X, backend, weights=weights)
    check(C, X, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ones_as_weights_are_the_mask_and_the_mask_is_exact(dtype, device, backend):
    X = make(50, 19, dtype, device)
    counted = torch.arange(50, device=device) % 4 != 1
    masked, weighted, dropped = (poisoned(19, device) for _ in range(3))
    run(masked, X, backend, weights=counted)
    run(weighted, X, backend, weights=counted.float())
    run(dropped, X[counted], backend)
    check(masked, X[counted])
    check(weighted, X[counted])
    check(dropped, X[counted])


@pytest.mark.parametrize("batched", [False, True])
def test_strides(batched, device, backend):
    base = make(60, 70, torch.bfloat16, device)
    X = base[::2, 3:40]
    weights = (torch.arange(30, device=device) % 4 != 0).float()
    if batched:  # not collapsible: sequence-first layout
        X, weights = X.unflatten(0, (10, 3)).transpose(0, 1), weights.view(10, 3).T
    C = poisoned(37, device).T.contiguous().T  # a C of other strides as well
    run(C, X, backend, weights=weights)
    check(C, X, weights=weights)


@pytest.mark.parametrize("batched", [False, True])
def test_strided_rows_of_16_bytes(batched, device, backend):
    """What the tensor descriptors take: a column slice of a wider matrix, and a wider C."""
    X = make(90, 320, torch.bfloat16, device)[:, 64:264]
    if batched:
        X = X.unflatten(0, (3, 30))[:, 1:]  # the first token of every sample left out
    wide = torch.full((200, 240), float("nan"), device=device)
    C = wide[:, 8:208]
    C.copy_(poisoned(200, device))
    run(C, X, backend)
    check(C, X)
    assert wide[:, :8].isnan().all() and wide[:, 208:].isnan().all()


@pytest.mark.parametrize("n", [65, 200])
def test_forty_batches(n, device, backend):
    X = make(256, n, torch.bfloat16, device)
    C = poisoned(n, device)
    for _ in range(40):
        run(C, X, backend)
    check(C, X, steps=40)


def test_without_fixed_order(device, backend):
    X = make(3000, 136, torch.bfloat16, device)
    C = poisoned(136, device)
    run(C, X, backend, deterministic=False)
    check(C, X)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_rows(dtype, device, backend):
    """Experts: empty ones first, in the middle and last, and one of a single token."""
    sizes = [0, 200, 0, 1, 77, 130, 0]
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).repeat_interleave(2)[::2]
    X = make(int(offsets[-1]) + 5, 150, dtype, device)  # rows after the last group do not count
    X[offsets[-1] :] = float("nan")
    C = torch.stack([poisoned(150, device, value=1.0) for _ in sizes])
    if backend == "cuda":
        with pytest.raises(ValueError, match="backend='cuda'; expected None, 'triton'"):
            syrk_ragged_(C, X, offsets, backend=backend)
        backend = None
    assert syrk_ragged_(C, X, offsets, alpha=0.5, backend=backend) is C
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        check(C[group], X[begin:end], start=torch.ones(150, 150, device=device), alpha=0.5)


def test_groups_without_rows(device):
    C = torch.ones(3, 8, 8, device=device)
    syrk_ragged_(C, torch.empty(0, 8, device=device), torch.zeros(4, dtype=torch.int32).to(device))
    syrk_ragged_(C, torch.ones(5, 8, device=device), torch.zeros(4, dtype=torch.int64).to(device))
    assert (C == 1).all()
    syrk_ragged_(
        C[:0], torch.ones(5, 8, device=device), torch.zeros(1, dtype=torch.int64).to(device)
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"C": torch.zeros(3, 3)}, ValueError, r"C has shape \(3, 3\); expected \(E, n, n\)"),
        ({"X": torch.zeros(2, 4, 3)}, ValueError, r"X has shape \(2, 4, 3\)"),
        ({"X": torch.zeros(4, 5)}, ValueError, r"expected \(5, 5\)"),
        (
            {"offsets": torch.tensor([0, 4])},
            ValueError,
            r"offsets has shape \(2,\); expected \(3,\)",
        ),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets is torch.float32"),
        ({"offsets": torch.tensor([0, 1, 4], device="meta")}, ValueError, "offsets is on meta"),
        ({"C": torch.zeros(2, 3, 3).double(), "backend": "triton"}, ValueError, "does not support"),
    ],
)
def test_bad_groups_are_named(change, error, words):
    arguments = {
        "C": torch.zeros(2, 3, 3),
        "X": torch.zeros(4, 3),
        "offsets": torch.tensor([0, 1, 4]),
        **change,
    }
    with pytest.raises(error, match=words):
        syrk_ragged_(**arguments)


def test_float64(device):
    X = make(30, 11, torch.float64, device)
    C = torch.zeros(11, 11, dtype=torch.float64, device=device)
    syrk_(C, X)
    torch.testing.assert_close(torch.tril(C), torch.tril(X.T @ X), rtol=1e-14, atol=1e-14)


def test_autocast_does_not_round_the_operands(device):
    X = make(64, 16, torch.float32, device)
    C = poisoned(16, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        syrk_(C, X)
    check(C, X)


def test_compile_traces_through(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(C, X, weights):
        syrk_(C, X * 2, weights=weights)
        return C.diagonal().sum()

    X, weights = make(12, 5, torch.float32, device), torch.ones(12, device=device)
    C = torch.zeros(5, 5, device=device)
    total = step(C, X, weights)
    expected = 4 * X.square().sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(C.trace(), expected)


def test_autograd_notices_the_change(device):
    C = torch.zeros(5, 5, device=device)
    X = make(12, 5, torch.float32, device)
    product = (C * torch.ones(5, 5, device=device, requires_grad=True)).sum()
    syrk_(C, X)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        syrk_(torch.zeros(5, 5, device=device), X)


def test_op_registration(device):
    args = (torch.zeros(5, 5, device=device), make(12, 5, torch.float32, device), 1.0, None)
    torch.library.opcheck(torch.ops.filet_kernels.syrk_, args)
    args = (torch.zeros(2, 5, 5, device=device), args[1], torch.tensor([0, 5, 9]).to(device), 1.0)
    torch.library.opcheck(torch.ops.filet_kernels.syrk_ragged_, args)


@settings(deadline=None, max_examples=30)
@given(T=st.integers(0, 40), n=st.integers(1, 40), seed=st.integers(0, 9), mask=st.booleans())
def test_random_shapes(T, n, seed, mask):
    X = make(T, n, torch.bfloat16, "cpu", seed)
    weights = torch.arange(T) % (seed + 2) if mask else None
    C = poisoned(n, "cpu")
    syrk_(C, X, weights=weights)
    check(C, X, weights=weights)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"X": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "X is torch.int32"),
        ({"C": torch.zeros(3, 3, dtype=torch.bfloat16)}, TypeError, "C is torch.bfloat16"),
        ({"X": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "float64 C"),
        ({"X": torch.zeros(3)}, ValueError, r"X has shape \(3,\)"),
        ({"C": torch.zeros(4, 4)}, ValueError, r"expected \(3, 3\)"),
        ({"C": torch.zeros(3, 3, device="meta")}, ValueError, "same device"),
        ({"weights": torch.ones(5)}, ValueError, r"weights has shape \(5,\); expected \(4,\)"),
        ({"weights": torch.ones(4, device="meta")}, ValueError, "weights is on meta"),
        ({"weights": torch.ones(4, dtype=torch.cfloat)}, TypeError, "weights is torch.complex64"),
        ({"backend": "cublas"}, ValueError, "'cublas'; expected None or one of cuda, triton"),
        ({"backend": "cuda"}, ValueError, "X is on cpu; expected a CUDA device"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"C": torch.zeros(3, 3), "X": torch.zeros(4, 3), **change}
    with pytest.raises(error, match=words):
        syrk_(arguments.pop("C"), arguments.pop("X"), **arguments)


def test_an_explicit_choice_is_not_replaced(device):
    pytest.importorskip("triton")
    skip_interpreter(device)
    X = make(4, 3, torch.float64, device)
    with pytest.raises(ValueError, match=r"backend='triton' does not support.*C is torch.float64"):
        syrk_(torch.zeros(3, 3, dtype=torch.float64, device=device), X, backend="triton")


def test_the_interpreter_is_never_chosen_by_itself():
    assert backend_of(torch.zeros(3, 3), torch.zeros(4, 3)) == "reference"


@needs_triton
@pytest.mark.parametrize("index", range(6))
def test_every_triton_configuration(index, device):
    skip_interpreter(device)
    from filet_kernels.syrk_triton import CONFIGS, syrk_triton

    config = CONFIGS[index]
    assert len(CONFIGS) == 6
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if config.unsupported(10 * major + minor, tma=True, pieces=1):
            pytest.skip(f"{config.name} does not run here")
    X = make(1000, 328, torch.bfloat16, device)
    C, turns = poisoned(328, device, value=1.0), turns_on(device)
    syrk_triton(C, X, 0.5, None, turns, config)
    check(C, X, start=torch.ones_like(C), alpha=0.5)
    assert not turns.any()


def test_what_a_triton_configuration_refuses():
    pytest.importorskip("triton")
    from filet_kernels.syrk_triton import CONFIGS, syrk_triton

    X = torch.zeros(4, 9, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"tma-128x256.*needs"):
        syrk_triton(torch.zeros(9, 9), X, 1.0, None, None, CONFIGS[0])


# --- on a GPU only --------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not CUDA, reason="it needs a CUDA device")


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    return request.param


def check_columns(C, X, columns, *, start=0.0):
    """Some columns of a C that is too large to check whole."""
    parts = X.split(1 << 14)
    product = sum(rows.double().T @ rows[:, columns].double() for rows in parts)
    diagonal = sum(rows.double().square().sum(0) for rows in parts)
    scale = torch.sqrt(diagonal.unsqueeze(1) * diagonal[columns].unsqueeze(0))
    # The library's products of as many tokens as one launch takes, for a square block.
    some = X[: 1 << 14, :1024]
    exact = some.double().T @ some.double()
    library = torch.mm(some.T, some, out_dtype=torch.float32)
    baseline = (library.double() - exact).abs().max() / exact.diagonal().max()
    error = (C[:, columns].double() - product - start).abs()
    floor = 4 * EPS * X.shape[0] ** 0.5 * scale + EPS * abs(start)
    below = torch.arange(X.shape[1], device=X.device).unsqueeze(1) >= columns.unsqueeze(0)
    bad = below & (error > 2 * baseline * scale + floor)
    assert not bad.any(), f"{int(bad.sum())}, largest {(error / scale)[below].max().item():.2g}"
    assert C[:, columns][~below].isnan().all()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, n",
    [(4096, 1024), (1000, 2048), (512, 4104), (200, 14336), (64, 28672), (1_000_000, 256),
     (300_000, 1536), (100, 46592)],
)  # fmt: skip
def test_large(T, n, kernel):
    """Up to where row × stride passes 2³¹, in C (n = 46592) and in X (T = 10⁶ of stride 4096)."""
    device = torch.device("cuda")
    wide = torch.randn(T, 4096 if T == 1_000_000 else n, device=device, dtype=torch.bfloat16)
    X = wide[:, :n]
    C = torch.full((n, n), float("nan"), device=device)
    for rows in range(0, n, 4096):  # without a mask of C's size
        block = C[rows : rows + 4096]
        block.masked_fill_(torch.ones_like(block, dtype=torch.bool).tril_(rows), 2.0)
    run(C, X, kernel)
    edges = torch.tensor([0, 1, 63, 64, 127, 128, 255, 256, n // 2, n - 129, n - 2, n - 1])
    check_columns(C, X, edges[edges < n].unique().to(device), start=2.0)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 136, 320, 512, 576, 1000, 1024, 1160, 1408, 1536, 2048, 2816])
@pytest.mark.parametrize("T", [1, 63, 64, 129, 3000])
def test_every_plan(T, n):
    """The CUDA kernels by hand: pairs, shares and grids, also where not chosen."""
    if why_no_extension():
        pytest.skip(why_no_extension())
    X = make(T, n, torch.bfloat16, "cuda")
    turns, extension = turns_on(X.device), cuda_extension()
    for kernel, size in PLANS:
        plan = extension.SyrkPlan(getattr(extension.SyrkKernel, kernel), size)
        C = poisoned(n, "cuda", value=1.0)
        extension.syrk_sm90(
            c=C.data_ptr(), stride_c=n, x=X.data_ptr(), stride_x=n, n=n, tokens=T, alpha=0.5,
            half=False, plan=plan, flags=turns.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        check(C, X, start=torch.ones_like(C), alpha=0.5)
        assert not turns.any()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("n", [256, 1024, 2048])
def test_runs_are_equal_bitwise(n, kernel):
    X = make(5000, n, torch.bfloat16, "cuda")
    first = torch.zeros(n, n, device="cuda")
    run(first, X, kernel)
    for _ in range(20):
        again = torch.zeros(n, n, device="cuda")
        run(again, X, kernel)
        assert torch.equal(first, again)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("n", [136, 2048])
def test_graph_without_synchronisation_or_temporaries(n, kernel):
    X = make(3000, n, torch.bfloat16, "cuda")
    C, expected = torch.zeros(n, n, device="cuda"), torch.zeros(n, n, device="cuda")
    for _ in range(3):
        run(expected, X, kernel)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(C, X, kernel)
        assert torch.cuda.max_memory_allocated() - before < 1 << 16
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(C, X, kernel)
    graph.replay()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        graph.replay()
    other.synchronize()
    assert torch.equal(C, expected)


@gpu
@pytest.mark.gpu
def test_streams_side_by_side(kernel):
    """Kernels that wait for turns must not starve each other."""
    X = make(4096, 2048, torch.bfloat16, "cuda")
    expected = torch.zeros(2048, 2048, device="cuda")
    for _ in range(30):
        run(expected, X, kernel)
    streams = [torch.cuda.Stream() for _ in range(4)]
    sums = [torch.zeros(2048, 2048, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, C in zip(streams, sums, strict=True):
            with torch.cuda.stream(stream):
                run(C, X, kernel)
    torch.cuda.synchronize()
    assert all(torch.equal(C, expected) for C in sums)


@gpu
@pytest.mark.gpu
def test_the_choice_on_this_gpu():
    C, X = torch.zeros(128, 128, device="cuda"), torch.zeros(8, 128, device="cuda").bfloat16()
    fast = torch.cuda.get_device_capability() == (9, 0) and why_no_extension() is None
    assert backend_of(C, X) == ("cuda" if fast else "triton")
    assert backend_of(C, X, torch.ones(8, device="cuda")) == "triton"
    assert backend_of(C, X.float()) == "triton"
    assert backend_of(C[1:, 1:], X[:, 1:]) == "triton"
    assert backend_of(C.double(), X) == "reference"
    wide = torch.zeros(4096, 2048, device="cuda").bfloat16()
    assert backend_of(torch.zeros(2048, 2048, device="cuda"), wide) == (
        "cuda" if fast else "triton"
    )
