"""Quadratic forms: diag(Vᵀ S V) from the lower triangle of a symmetric S.

With v a column of V and S split into blocks,
    vᵀ S v = Σ_I v_Iᵀ S_II v_I + 2 Σ_{I>J} v_Iᵀ S_IJ v_J,
so only the lower triangle is read and half of the products are done. FILet's energies
(arXiv 2605.01046, Algorithm 1) are such diagonals.

Three implementations: the CUDA kernel of csrc/, the Triton kernel of
:mod:`filet_kernels.quadform_triton`, and plain torch. The first that supports the operands is used.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, capability, define, on, why_no_triton
from filet_kernels.extension import cuda_extension, stream_of, why_no_extension
from filet_kernels.product import product, slices, split

__all__ = [
    "BACKENDS",
    "Precision",
    "backend_of",
    "quadform_cuda",
    "quadform_diag",
    "quadform_diag_reference",
]

Precision = Literal["accurate", "fast"]

_S_DTYPES = (torch.float32, torch.float64)
_V_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CUDA_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # FiletDtype

# Rows of S per step of the reference: its temporaries are (block, n) and (block, p).
_BLOCK = 512

# Columns of V that exist at a time where V is given as a product.
_COLUMNS = 2048

# Bytes that the CUDA kernel may take for columns of V, however small S is: fewer columns at a time
# leave multiprocessors without work.
_WORKSPACE = 2**26


def quadform_diag_reference(S: Tensor, V: Tensor, precision: str) -> Tensor:
    """diag(Vᵀ S V), (p,) float64: block rows of the lower triangle against V."""
    if precision == "fast":
        # bfloat16 operands have exact float32 products; only their sum is rounded.
        operand, compute = torch.bfloat16, torch.float32
    else:
        # FILet looks for directions in which vᵀSv cancels: float64 leaves the error of S alone.
        operand, compute = torch.float64, torch.float64
    n, p = V.shape
    V = V.to(operand).to(compute)
    total = torch.zeros(p, dtype=torch.float64, device=V.device)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        rows = S[start:stop, :stop].to(operand).to(compute)
        below, diagonal = rows[:, :start], torch.tril(rows[:, start:])
        diagonal = diagonal + torch.tril(diagonal, -1).T
        product = 2 * (below @ V[:start]) + diagonal @ V[start:stop]
        total += (V[start:stop] * product).sum(0, dtype=torch.float64)
    return total


def _reference(S: Tensor, V: Tensor, precision: str, workspace: int) -> Tensor:
    return quadform_diag_reference(S, V, precision)


def _unsupported_operands(S: Tensor, v_dtype: torch.dtype) -> str | None:
    if S.dtype != torch.float32 or v_dtype not in _CUDA_DTYPES:
        return f"S is {S.dtype}, V is {v_dtype}; expected a float32 S and a V of at most float32"
    return None


def _triton_unsupported(S: Tensor, v_dtype: torch.dtype) -> str | None:
    return why_no_triton("V", S.device) or _unsupported_operands(S, v_dtype)


def _triton(S: Tensor, V: Tensor, precision: str, workspace: int) -> Tensor:
    from filet_kernels.quadform_triton import quadform_triton

    major, minor = capability(V.device) if V.is_cuda else (9, 0)
    with on(V.device):
        return quadform_triton(S, V, precision == "accurate", major * 10 + minor)


def _cuda_unsupported(S: Tensor, v_dtype: torch.dtype) -> str | None:
    if not S.is_cuda:
        return f"V is on {S.device}; expected a CUDA device"
    if capability(S.device) not in ((8, 0), (9, 0)):
        return "it needs compute capability 8.0 or 9.0"
    return _unsupported_operands(S, v_dtype) or why_no_extension()


def quadform_cuda(
    S: Tensor, V: Tensor, precision: str, workspace: int, portable: bool | None = None
) -> Tensor:
    """``portable``: the kernel for compute capability 8.0; None takes it where it has to be."""
    if portable is None:
        portable = capability(V.device) != (9, 0)
    n, p = V.shape
    with on(V.device):
        call = cuda_extension().Quadform(
            s=S.data_ptr(),
            stride_s_row=S.stride(0),
            stride_s_column=S.stride(1),
            v=V.data_ptr(),
            stride_v_row=V.stride(0),
            stride_v_column=V.stride(1),
            dtype=_CUDA_DTYPES[V.dtype],
            n=n,
            p=p,
            accurate=precision == "accurate",
            portable=portable,
            least_bytes=workspace,
        )
        first, second = (
            torch.empty(size, dtype=torch.uint8, device=V.device) for size in call.workspaces()
        )
        out = torch.empty(p, dtype=torch.float64, device=V.device)
        call.run(
            out=out.data_ptr(),
            workspaces=(first.data_ptr(), second.data_ptr()),
            stream=stream_of(V.device),
        )
    return out


# Operands: S, and V's dtype. Called with S, V, the precision and _WORKSPACE.
_OPERATION = Operation(
    Backend("cuda", quadform_cuda, _cuda_unsupported),
    Backend("triton", _triton, _triton_unsupported),
    Backend("reference", _reference),
)
BACKENDS = _OPERATION.names


def backend_of(S: Tensor, V: Tensor | tuple[Tensor, Tensor]) -> str:
    """The implementation that :func:`quadform_diag` uses for them: one of :data:`BACKENDS`."""
    return _OPERATION.choose(None, S, _dtype(V) if isinstance(V, tuple) else V.dtype).name


def _dtype(factors: tuple[Tensor, Tensor]) -> torch.dtype:
    """Of the product of two factors, as a kernel takes it."""
    wide = any(factor.dtype == torch.float64 for factor in factors)
    return torch.float64 if wide else torch.float32


def quadform_diag(
    S: Tensor,
    V: Tensor | tuple[Tensor, Tensor],
    *,
    precision: Precision = "accurate",
    backend: str | None = None,
) -> Tensor:
    """Diagonal of a quadratic form: q_i = v_iᵀ S v_i for every column v_i of V.

    Args:
        S: (n, n), float32 or float64, symmetric; only the lower triangle is read. Any strides.
        V: (n, p), bfloat16, float16, float32 or float64. Any strides. p = 0 gives an empty result.
            Or factors (A, B), (n, k) and (k, p) of these dtypes, for V = A B: it is formed 2048
            columns at a time, to float32's precision (float64's on a CPU and for float64 factors).
        precision: "accurate": the error of q_i is at most 5e-7 |v_i|ᵀ|S||v_i|, what float32
            arithmetic can give (on a CPU and for float64 operands it is float64's); "fast" rounds S
            and V to bfloat16 and accumulates in float32, an error of up to 3 · 2⁻⁸ |v_i|ᵀ|S||v_i|,
            which is large beside v_iᵀ S v_i where that cancels.
        backend: one of :data:`BACKENDS`, or None for the first that supports the operands.

    Returns:
        (p,) float64. Nothing is mutated; operands may share memory. The same on every run for the
        same inputs, backend and GPU model. The Triton kernel allocates one float per column and 128
        rows; the CUDA kernel two, and for the operands as the tensor cores take them half of S's
        bytes (a quarter when fast), and for columns of V at a time what that leaves of S's bytes,
        or 64 MiB; more only where the floats of very many columns take most of it. Neither
        synchronises with the host; both can be captured in a CUDA graph. Traced by torch.compile as
        ``torch.ops.filet_kernels.quadform_diag`` (or ``quadform_product``).

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes, devices or a precision that do not fit, or a backend that does not
            support the operands.
        RuntimeError: the driver refused the launch.
    """
    if S.dtype not in _S_DTYPES:
        raise TypeError(f"S is {S.dtype}; expected torch.float32 or torch.float64")
    if S.dim() != 2 or S.shape[0] != S.shape[1]:
        raise ValueError(f"S has shape {tuple(S.shape)}; expected a square matrix")
    named = zip(("A", "B"), V, strict=True) if isinstance(V, tuple) else [("V", V)]
    rows, size = S.shape[0], "S's n"
    for name, factor in named:
        if factor.dtype not in _V_DTYPES:
            raise TypeError(
                f"{name} is {factor.dtype}; expected one of {', '.join(map(str, _V_DTYPES))}"
            )
        if factor.dim() != 2 or factor.shape[0] != rows:
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}; expected ({rows}, "
                f"{'k' if name == 'A' else 'p'}), as {size}"
            )
        if factor.device != S.device:
            raise ValueError(
                f"{name} is on {factor.device} but S is on {S.device}; expected the same device"
            )
        rows, size = factor.shape[1], "A's k"
    if precision not in ("accurate", "fast"):
        raise ValueError(f"precision={precision!r}; expected 'accurate' or 'fast'")
    _OPERATION.check(backend)
    if isinstance(V, tuple):
        q: Tensor = torch.ops.filet_kernels.quadform_product(S, *V, precision, backend)
    else:
        q = torch.ops.filet_kernels.quadform_diag(S, V, precision, backend)
    return q


def _quadform_op(
    S: Tensor,
    V: Tensor,
    precision: str,
    backend: str | None = None,
    workspace: int = _WORKSPACE,
) -> Tensor:
    chosen = _OPERATION.choose(backend, S, V.dtype)
    if not V.numel():
        return _empty(S, V)
    with torch.autocast(S.device.type, enabled=False):  # it would round the products' operands
        q: Tensor = chosen.run(S, V, precision, workspace)
    return q


def _product_op(
    S: Tensor, A: Tensor, B: Tensor, precision: str, backend: str | None = None
) -> Tensor:
    chosen = _OPERATION.choose(backend, S, _dtype((A, B)))
    total = S.new_zeros(B.shape[1], dtype=torch.float64)
    if S.numel():
        a = split(A) if chosen.name != "reference" else None
        with torch.autocast(S.device.type, enabled=False):
            for columns in slices(B.shape[1], _COLUMNS):
                if a is None:
                    V = A.double() @ B[:, columns].double()
                    total[columns] = chosen.run(S, V, precision, _WORKSPACE)
                else:
                    V, scale = product(a, split(B[:, columns], columns=True))
                    total[columns] = chosen.run(S, V, precision, _WORKSPACE) / scale**2
    return total


def _empty(S: Tensor, V: Tensor, *args: object) -> Tensor:
    return S.new_zeros(V.shape[1], dtype=torch.float64)


define(
    "quadform_diag(Tensor S, Tensor V, str precision, str? backend=None, "
    f"int workspace={_WORKSPACE}) -> Tensor",
    _quadform_op,
    _empty,
)
define(
    "quadform_product(Tensor S, Tensor A, Tensor B, str precision, str? backend=None) -> Tensor",
    _product_op,
    lambda S, A, B, precision, backend=None: _empty(S, B),
)
