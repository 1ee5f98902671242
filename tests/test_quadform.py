import pytest
import torch

from filet_kernels import quadform, quadform_diag
from filet_kernels.quadform import BACKENDS, backend_of
from with_triton import NO_TRITON, needs_triton, skip_interpreter

CUDA = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOAT32 = 5e-7  # of |v|ᵀ|S||v|: what "accurate" keeps in the kernels


@pytest.fixture(params=[*BACKENDS, "cuda-8.0"])
def backend(request, device):
    """Each implementation that runs on the device; Triton's is interpreted on a CPU.

    "cuda-8.0" is the extension's kernel for that compute capability, on whatever GPU there is.
    """
    if request.param == "triton" and NO_TRITON:
        pytest.skip(NO_TRITON)
    if device.type == "cpu" and (
        request.param != "reference" and (CUDA or "cuda" in request.param)
    ):
        pytest.skip("it needs a CUDA device")
    if "cuda" in request.param:
        reason = quadform._cuda_unsupported(torch.ones(1, 1, device=device), torch.float32)
        if reason is not None:
            pytest.skip(reason)
    return request.param


def run(S, V, backend, precision="accurate"):
    if backend == "cuda-8.0":
        return quadform.quadform_cuda(S, V, precision, quadform._WORKSPACE, portable=True)
    return quadform_diag(S, V, precision=precision, backend=backend)


def exact(S, V):
    """vᵀSv and |v|ᵀ|S||v| of every column in float64, from the lower triangle."""
    S, V = torch.tril(S.double()), V.double()
    S = S + torch.tril(S, -1).T
    return (V * (S @ V)).sum(0), (V.abs() * (S.abs() @ V.abs())).sum(0)


def make(n, p, device, v_dtype=torch.float32):
    """S with NaN above the diagonal, V, and what is exact."""
    generator = torch.Generator().manual_seed(n * 1000 + p)
    X = torch.randn(n + 5, n, generator=generator, dtype=torch.float64)
    S = (X.T @ X).float().to(device)
    V = torch.randn(n, p, generator=generator).to(v_dtype).to(device)
    truth, magnitude = exact(S, V)
    return poisoned(S), V, truth, magnitude


def poisoned(S):
    above = torch.triu(torch.ones_like(S, dtype=torch.bool), 1)
    return S.masked_fill(above, float("nan"))


def check(result, truth, magnitude, bound):
    assert result.shape == truth.shape and result.dtype == torch.float64
    error = (result - truth).abs() / magnitude
    assert (error <= bound).all(), f"column {int(error.argmax())} is off by {error.max():.1e}"


def accurate(backend):
    return 1e-13 if backend == "reference" else FLOAT32


@pytest.mark.parametrize("v_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, p", [(1, 1), (1, 6), (7, 1), (40, 33), (129, 65), (200, 300), (513, 5)]
)
def test_accurate(n, p, v_dtype, device, backend):
    S, V, truth, magnitude = make(n, p, device, v_dtype)
    check(run(S, V, backend), truth, magnitude, accurate(backend))


@pytest.mark.parametrize("v_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, p", [(1, 1), (7, 3), (150, 290)])
def test_fast(n, p, v_dtype, device, backend):
    """Three operands rounded to bfloat16 and float32 sums: neither less nor more accurate.

    The unit roundoff is 2⁻⁸, in the interpreter, which cuts off, 2⁻⁷.
    """
    S, V, truth, magnitude = make(n, p, device, v_dtype)
    interpreted = backend == "triton" and device.type == "cpu"
    result = run(S, V, backend, "fast")
    check(result, truth, magnitude, 3 * 2.0 ** (-7 if interpreted else -8) + n * 2.0**-24)
    assert (result - truth).abs().max() > 1e-9 * magnitude.max()


@pytest.mark.parametrize("v_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_terms_of_one_sign(v_dtype, device, backend):
    """Nothing averages out: what a sum always loses on the same side shows."""
    n = 300
    generator = torch.Generator().manual_seed(1)
    S = 1 + torch.rand(n, n, generator=generator)
    V = (1 + torch.rand(n, 5, generator=generator)).to(v_dtype)
    S, V = S.to(device), V.to(device)
    check(run(S, V, backend), *exact(S, V), accurate(backend))


def test_unit_vectors_read_the_diagonal(device, backend):
    S, _, _, _ = make(140, 1, device)
    V = torch.eye(140, device=device) * torch.logspace(-9, 9, 140, device=device)
    check(run(S, V, backend), *exact(S, V), accurate(backend))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_scales(scale, device, backend):
    """Columns of V and rows of S of very different sizes, each right on its own."""
    S, V, _, _ = make(70, 6, device)
    scales = torch.logspace(-4, 4, 70, device=device)
    S = scale * (scales.unsqueeze(1) * S * scales)
    V = V / scales.unsqueeze(1) * torch.tensor([1.0, 1e-6, 1e6, 1.0, 3.0, 1e3], device=device)
    check(run(S, V, backend), *exact(S, V), accurate(backend))


def test_outliers_and_directions_orthogonal_to_them(device, backend):
    """What FILet looks for: vᵀSv where nearly all of S cancels. What is left of it?

    Data of unit variance plus a component 1000 times as large, along three channels (first half of
    the columns: v is zero there) or along one dense vector u (second half: v is orthogonal to u in
    float32, so that vᵀSv is 1e-6 of |v|ᵀ|S||v|).
    """
    n, p = 192, 16
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(600, n, generator=generator, dtype=torch.float64)
    V = torch.randn(n, p, generator=generator, dtype=torch.float64)
    u = torch.randn(n, generator=generator, dtype=torch.float64)
    channels = X.clone()
    channels[:, [3, 50, 170]] *= 1000
    V[[3, 50, 170]] = 0
    u[[3, 50, 170]] = 0
    u /= u.norm()
    dense = X + 1000 * torch.randn(600, 1, generator=generator, dtype=torch.float64) * u
    V[:, p // 2 :] -= u.unsqueeze(1) * (u @ V[:, p // 2 :])
    V = V.float().to(device)
    lost = {}
    for name, data, columns in (
        ("channels", channels, slice(0, p // 2)),
        ("dense", dense, slice(p // 2, p)),
    ):
        S = (data.T @ data).float().to(device)
        truth, magnitude = exact(S, V[:, columns])
        if name == "dense":
            assert (magnitude > 1e4 * truth).all()
        for precision in ("accurate", "fast"):
            result = run(S, V[:, columns], backend, precision)
            lost[name, precision] = float(((result - truth).abs() / truth).max())
        check(run(S, V[:, columns], backend), truth, magnitude, accurate(backend))
    # Channels of their own cost nothing, in either mode.
    assert lost["channels", "accurate"] <= 1e-5 and lost["channels", "fast"] <= 0.1
    # Along a dense vector "accurate" keeps the energy to a few percent, and "fast" nothing of it.
    assert lost["dense", "accurate"] <= 0.05 and lost["dense", "fast"] > 10


def test_strides(device, backend):
    S, V, truth, magnitude = make(130, 50, device, torch.bfloat16)
    wide = torch.full((260, 103), float("nan"), device=device, dtype=torch.bfloat16)
    wide[::2, 3::2] = V
    spread = torch.full((132, 262), float("nan"), device=device)
    spread[1:131, 1:261:2] = S
    for matrix in (S, S.T.contiguous().T, spread[1:131, 1:261:2]):
        for columns in (V, V.T.contiguous().T, wide[::2, 3::2]):
            check(run(matrix, columns, backend), truth, magnitude, accurate(backend))
    one = V[:, :1].expand(130, 50)  # a stride of 0
    check(run(S, one, backend), truth[:1].expand(50), magnitude[:1].expand(50), accurate(backend))


def test_operands_may_share_memory(device, backend):
    S, _, _, _ = make(140, 1, device)
    S = torch.tril(S)
    before = S.clone()
    for V in (S, S.T, S[:, 20:50]):
        check(run(S, V, backend), *exact(S, V), accurate(backend))
    assert torch.equal(S, before)


@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_the_same_bits_on_every_run(precision, device, backend):
    S, V, _, _ = make(300, 140, device)
    assert torch.equal(run(S, V, backend, precision), run(S, V, backend, precision))


@pytest.mark.parametrize("v_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_columns_of_v_in_parts(precision, v_dtype, device, backend):
    """As where S is large: the same bits, however little memory V's columns have."""
    if "cuda" not in backend:
        pytest.skip("it does not copy V")
    S, V, _, _ = make(300, 1100, device, v_dtype)
    in_parts = quadform.quadform_cuda(S, V, precision, 1, portable=backend != "cuda" or None)
    assert torch.equal(in_parts, run(S, V, backend, precision))


def test_empty(device, backend):
    if backend == "cuda-8.0":
        pytest.skip("handled before the kernel")
    S, V, _, _ = make(30, 12, device)
    assert run(S, V[:, :0], backend).shape == (0,)
    for V in (
        torch.empty(0, 4, device=device),
        (torch.empty(0, 3, device=device), torch.empty(3, 4, device=device)),
    ):
        zero = run(torch.empty(0, 0, device=device), V, backend)
        assert torch.equal(zero.cpu(), torch.zeros(4, dtype=torch.float64))


def test_float64(device):
    S, V, _, _ = make(40, 9, device)
    S, V = poisoned(torch.tril(S.double()) + 1e-9), V.double() + 1e-12
    check(quadform_diag(S, V), *exact(S, V), 1e-14)
    check(quadform_diag(S.float(), V), *exact(S.float(), V), 1e-14)
    check(quadform_diag(S, (V, torch.eye(9, device=device))), *exact(S, V), 1e-14)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16,) * 2], ids=str)
def test_product(dtypes, device, backend, monkeypatch):
    """V = A B, some columns at a time, each in a range of its own."""
    if backend == "cuda-8.0":
        backend = "cuda"
    monkeypatch.setattr(quadform, "_COLUMNS", 16)
    generator = torch.Generator().manual_seed(3)
    S, _, _, _ = make(60, 1, device)
    A = torch.randn(60, 30, generator=generator).to(dtypes[0]).to(device)
    B = torch.randn(30, 37, generator=generator) * torch.logspace(-3, 3, 37)
    B = B.to(dtypes[1]).to(device)
    result = quadform_diag(S, (A, B.T.contiguous().T), backend=backend)
    check(result, *exact(S, A.double() @ B.double()), accurate(backend))
    if backend == "reference" or device.type == "cuda":
        empty = quadform_diag(S, (A[:, :0], B[:0]), backend=backend)
        assert torch.equal(empty.cpu(), torch.zeros(37, dtype=torch.float64))


def test_autocast_does_not_round_the_operands(device, backend):
    if backend == "cuda-8.0":
        pytest.skip("as the other kernel")
    S, V, truth, magnitude = make(40, 9, device)
    identity = torch.eye(9, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        check(run(S, V, backend), truth, magnitude, accurate(backend))
        check(run(S, (V, identity), backend), truth, magnitude, accurate(backend))


def test_compile_traces_through_and_registration(device):
    S, V, truth, magnitude = make(30, 12, device)
    S = torch.tril(S)  # opcheck compares inputs before and after, and NaN is not NaN
    identity = torch.eye(12, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(S, V, identity):
        return quadform_diag(S, V) + quadform_diag(S, (V, identity))

    check(total(S, V, identity) / 2, truth, magnitude, FLOAT32)
    torch.library.opcheck(torch.ops.filet_kernels.quadform_diag, (S, V, "accurate"))
    torch.library.opcheck(
        torch.ops.filet_kernels.quadform_product, (S, V, identity, "fast", "reference")
    )


@pytest.mark.skipif(not CUDA, reason="it needs a CUDA device")
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_streams_and_graphs(precision, device, backend):
    if device.type == "cpu" or backend == "reference":
        pytest.skip("a kernel on a GPU")
    S, V, _, _ = make(300, 140, device)
    S = torch.tril(S)
    expected = run(S, V, backend, precision)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(V)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # V comes late on this stream
        late.copy_(V)
        result = run(S, late, backend, precision)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(S, late, backend, precision)
    late.copy_(V.flip(1))
    for _ in range(2):
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected.flip(0))


@pytest.mark.skipif(not CUDA, reason="it needs a CUDA device")
@pytest.mark.parametrize("precision", ["accurate", "fast"])
# The last has so many columns that V is packed in parts, of which the last is smaller.
@pytest.mark.parametrize("n, p", [(1030, 700), (4096, 300), (130, 5000), (2050, 16000)])
def test_large(n, p, precision, device, backend):
    if device.type == "cpu":
        pytest.skip("it needs a CUDA device")
    for v_dtype in DTYPES:
        S, V, truth, magnitude = make(n, p, device, v_dtype)
        bound = accurate(backend) if precision == "accurate" else 3 * 2.0**-8
        check(run(S, V, backend, precision), truth, magnitude, bound)


@pytest.fixture
def late(device, backend):
    """n -> S, V, vᵀSv: most of S is packed while the products run (backend "cuda"), fast.

    S and V are positive and of few bits: bfloat16 takes them as they are, and a box of S (64 × 64)
    that is read too early costs 2e-3 of vᵀSv at these sizes.
    """
    if device.type == "cpu" or "cuda" not in backend:
        pytest.skip("a kernel in CUDA C++")

    def make(n):
        generator = torch.Generator().manual_seed(n)
        S = torch.randint(64, 128, (n, n), generator=generator).float().to(device)
        V = torch.randint(64, 128, (n, 4608), generator=generator).bfloat16().to(device)
        return poisoned(S), V, exact(S, V)[0]

    return make


BOX = 1e-4  # of vᵀSv: far less than a box, more than the tensor cores cut off in 2200 terms


@pytest.mark.parametrize("n", [2048, 2100, 2101])  # the last has no rows of whole 16 bytes
def test_packing_behind_the_products(n, late, backend):
    """Over and over, in memory that held other tiles and counts; S packed before; V packed too."""
    S, V, truth = late(n)
    first = run(S, V, backend, "fast")
    check(first, truth, truth, BOX)
    for scale in (4.0, 0.25, 1.0):
        assert torch.equal(run(scale * S, V, backend, "fast"), scale * first)
    spread = torch.full((n, 2 * n), float("nan"), device=S.device)[:, ::2]
    spread.copy_(S)
    assert torch.equal(run(spread, V, backend, "fast"), first)
    for v_dtype in (torch.float16, torch.float32):  # V is packed as well, some columns at a time
        assert torch.equal(run(S, V.to(v_dtype), backend, "fast"), first)


def test_packing_on_two_streams_and_in_graphs(late, backend):
    """A kernel that needed all of its blocks at once would hang where two share the GPU."""
    S, V, _ = late(2100)
    expected = run(S, V, backend, "fast")
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    scaled = [2 * S, 4 * S]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, matrix, scale in zip(streams, scaled, (2, 4), strict=True):
            with torch.cuda.stream(stream):
                results.append((run(matrix, V, backend, "fast"), scale))
    torch.cuda.synchronize()
    for result, scale in results:
        assert torch.equal(result, scale * expected)
    matrix = S.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(matrix, V, backend, "fast")
    for scale in (1, 8, 2):
        matrix.copy_(scale * S)
        graph.replay()
        assert torch.equal(result, scale * expected)


@needs_triton
@pytest.mark.parametrize("index", range(3))
def test_every_triton_configuration(index, device):
    skip_interpreter(device)
    from filet_kernels.quadform_triton import CONFIGS, quadform_triton

    config = CONFIGS[index]
    capability = 90 if device.type == "cpu" else 10 * torch.cuda.get_device_capability()[0]
    S, V, truth, magnitude = make(300, 290, device, torch.bfloat16)
    if config.unsupported(capability, config.accurate, V.element_size()) is not None:
        pytest.skip("another GPU")
    result = quadform_triton(S, V, config.accurate, capability, config)
    check(result, truth, magnitude, FLOAT32 if config.accurate else 3 * 2.0**-7)
    with pytest.raises(ValueError, match=f"config='{config.name}': .* is for precision="):
        quadform_triton(S, V, not config.accurate, capability, config)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"S": torch.eye(3).half()}, TypeError, "S is torch.float16"),
        ({"V": torch.ones(3, 2).int()}, TypeError, "V is torch.int32"),
        ({"S": torch.ones(3, 4)}, ValueError, "square"),
        ({"V": torch.ones(4, 2)}, ValueError, r"V has shape \(4, 2\); expected \(3, p\), as S's n"),
        ({"V": torch.ones(3)}, ValueError, r"V has shape \(3,\)"),
        ({"V": torch.ones(3, 2, device="meta")}, ValueError, "same device"),
        ({"precision": "exact"}, ValueError, "precision='exact'"),
        ({"V": (torch.ones(4, 2), torch.ones(2, 5))}, ValueError, r"A has .* expected \(3, k\)"),
        ({"V": (torch.ones(3, 2), torch.ones(3, 5))}, ValueError, r"B has .* expected \(2, p\)"),
        ({"V": (torch.ones(3, 2), torch.ones(2, 5).int())}, TypeError, "B is torch.int32"),
        ({"backend": "cublas"}, ValueError, "'cublas'; expected None or one of cuda, triton"),
        ({"backend": "cuda"}, ValueError, "V is on cpu; expected a CUDA device"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"S": torch.eye(3), "V": torch.ones(3, 2), **change}
    with pytest.raises(error, match=words):
        quadform_diag(arguments.pop("S"), arguments.pop("V"), **arguments)


@pytest.mark.parametrize("product", [False, True])
def test_an_explicit_choice_is_not_replaced(product, device):
    pytest.importorskip("triton")
    skip_interpreter(device)
    S, V = torch.eye(3, device=device), torch.ones(3, 3, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'triton' does not support.*V is torch.float64"):
        quadform_diag(S, (S, V) if product else V, backend="triton")


def test_the_interpreter_is_never_chosen_by_itself():
    assert backend_of(torch.eye(3), torch.ones(3, 2)) == "reference"
    assert backend_of(torch.eye(3), (torch.ones(3, 2), torch.ones(2, 2))) == "reference"
