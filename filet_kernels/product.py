"""Products A B of float32's precision on the tensor cores, for results that exist in part only.

With powers of two a and b_j that bring A and the columns of B into float16's range,
    a A = A₀ + 2⁻¹¹ A₁,   b_j B_j = B₀ + 2⁻¹¹ B₁   (float16 each, together right to 2⁻²³),
    a b_j (A B)_j = A₀ B₀ + 2⁻¹¹ (A₁ B₀ + A₀ B₁) + 2⁻²² A₁ B₁,
of which the last is left out. bfloat16 and float16 matrices need one part, so three products of
float16 matrices, two or one give what six, three or one of bfloat16 parts would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from filet_kernels.extension import extension_on, stream_of

__all__ = [
    "Split",
    "add_product",
    "column_sums",
    "exact_float32",
    "mirror_",
    "power_of_two",
    "product",
    "slices",
    "split",
    "transposed",
]

# Rows of B that one product sums up. The tensor cores cut off what they add below the last bit of a
# sum, a relative error of up to 2⁻²⁴ for every 16 of them; between products it is rounded. (In an
# emulation on SmolLM2-135M sums of 4608 rows changed energies by up to 2e-5, of 1024 by 3e-6.)
_ROWS_A_SUM = 2048

# Comparing versions takes 20 µs. Before, addmm's summand had to have the factors' dtype.
_ADDS_TO_FLOAT32 = torch.__version__ >= "2.10"

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of the extension

_SECOND_PART = 2.0**-11  # what second parts are to be multiplied by
_LARGEST = 2.0**14  # power of two of the largest element
_RESULT = _LARGEST**-2  # keeps products, and quadratic forms of them, in float32's range


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products of float32's precision, whatever is allowed outside (TF32, as a rule).

    torch refuses to mix its two ways of setting that, so the one in use is kept to.
    """
    matmul: Any = torch.backends.cuda.matmul
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend
        allowed, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = allowed
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


@dataclass(frozen=True)
class Split:
    """x · scale as float16 parts; ``scale``, of powers of two, is float64: () or one a column."""

    parts: tuple[Tensor, ...]
    scale: Tensor


def split(x: Tensor, *, columns: bool = False) -> Split:
    """The parts of a matrix x in bfloat16, float16 or float32, scaled as a whole or by columns.

    What is 2⁻²⁹ of the largest element or less loses bits, at 2⁻⁵¹ of it.
    """
    size = (x.shape[1],) if columns else ()
    if x.dtype == torch.float16 or not x.numel():
        return Split((x.half(),), torch.ones(size, dtype=torch.float64, device=x.device))
    if (extension := extension_on(x.device)) is not None:
        return _split_at_once(extension, x, columns)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=0 if columns else None).float()
    scale = _LARGEST / power_of_two(largest).clamp(min=2.0**-100)
    if x.dtype == torch.bfloat16:
        return Split(((x * scale.bfloat16()).half(),), scale.double())
    rest = x * scale
    first = rest.half()
    rest -= first  # exact
    rest *= 1 / _SECOND_PART
    return Split((first, rest.half()), scale.double())


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most x, float32 and not negative; 0 below 2⁻¹²⁶.

    The exponent's bits: a power function need not be exact, and torch.ldexp runs on the current
    device, whichever its operands are on (pytorch/pytorch#189567).
    """
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _split_at_once(extension: ModuleType, x: Tensor, columns: bool) -> Split:
    """The same in two passes over x; torch takes up to seven."""
    count = x.shape[1] if columns else 1
    first = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    second = torch.empty_like(first) if x.dtype == torch.float32 else None
    scale = torch.empty(count, dtype=torch.float64, device=x.device)
    largest = torch.empty(count, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device):
        extension.split(
            x=x.data_ptr(),
            stride_row=x.stride(0),
            stride_column=x.stride(1),
            dtype=_DTYPES[x.dtype],
            rows=x.shape[0],
            columns=x.shape[1],
            by_column=columns,
            largest=largest.data_ptr(),
            scale=scale.data_ptr(),
            first=first.data_ptr(),
            second=0 if second is None else second.data_ptr(),
            stream=stream_of(x.device),
        )
    return Split((first,) if second is None else (first, second), scale if columns else scale[0])


def column_sums(V: Tensor, W: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ_i V_ij² and Σ_i V_ij W_ij of float32 V and a W of at most float32: (p,) float64 each.

    Summed in float32, 64 rows at a time on a GPU (torch would copy V to float64 for more).
    Without W the second is empty memory.
    """
    squares, products = V.new_empty(2, V.shape[1], dtype=torch.float64)
    extension = extension_on(V.device)
    if extension is None or not V.is_contiguous():
        squares.copy_(torch.linalg.vector_norm(V, dim=0).double() ** 2)
        return squares, products if W is None else (V * W).sum(0).double()
    parts = V.new_empty(extension.column_sums_parts(V.shape[0]), 2, V.shape[1])
    other = V if W is None else W
    with torch.cuda.device(V.device):
        extension.column_sums(
            v=V.data_ptr(),
            w=0 if W is None else W.data_ptr(),
            stride_w_row=other.stride(0),
            stride_w_column=other.stride(1),
            dtype=_DTYPES[other.dtype],
            rows=V.shape[0],
            columns=V.shape[1],
            parts=parts.data_ptr(),
            squares=squares.data_ptr(),
            products=products.data_ptr(),
            stream=stream_of(V.device),
        )
    return squares, products


def transposed(X: Tensor) -> Tensor:
    """A contiguous copy of Xᵀ, for an X of any strides in a dtype of 2 or 4 bytes.

    torch's own takes 0.45 ms for a 4096 × 14336 X in bfloat16 (H100), six times what the bytes do.
    """
    extension = extension_on(X.device)
    if extension is None or X.stride(1) != 1:
        return X.T.contiguous()
    out = X.new_empty(X.shape[1], X.shape[0])
    with torch.cuda.device(X.device):
        extension.transpose(
            x=X.data_ptr(),
            stride=X.stride(0),
            rows=X.shape[0],
            columns=X.shape[1],
            bytes=X.element_size(),
            out=out.data_ptr(),
            stream=stream_of(X.device),
        )
    return out


def mirror_(C: Tensor) -> Tensor:
    """Copies what lies below the diagonal of a float32 matrix of contiguous rows above it."""
    if (extension := extension_on(C.device)) is not None:
        with torch.cuda.device(C.device):
            stream = stream_of(C.device)
            extension.mirror(c=C.data_ptr(), n=C.shape[0], stride=C.stride(0), stream=stream)
    else:
        for block in slices(C.shape[0], 1024):
            C[: block.start, block] = C[block, : block.start].T
            diagonal = C[block, block]
            diagonal.tril_().add_(torch.tril(diagonal, -1).T)
    return C


def product(a: Split, b: Split) -> tuple[Tensor, Tensor]:
    """C, float32, and scale (p,), float64, with C = A B · scale for A (m, k) and B (k, p).

    The small products enter first. Deterministic as the library's products are.
    """
    A, B = a.parts[0], b.parts[0]
    terms = [(x, B, _RESULT * _SECOND_PART) for x in a.parts[1:]]
    terms += [(A, x, _RESULT * _SECOND_PART) for x in b.parts[1:]]
    terms += [(A[:, rows], B[rows], _RESULT) for rows in slices(B.shape[0], _ROWS_A_SUM)]
    C = A.new_empty(A.shape[0], B.shape[1], dtype=torch.float32)
    if not B.shape[0]:
        C.zero_()
    with torch.autocast(C.device.type, enabled=False):
        for number, term in enumerate(terms):
            add_product(C, *term, anew=number == 0)
    return C, (a.scale * b.scale * _RESULT).expand(C.shape[1])


def add_product(C: Tensor, A: Tensor, B: Tensor, alpha: float, anew: bool) -> None:
    """C += alpha A B, or where ``anew`` C = alpha A B, whatever is in C."""
    beta = 0 if anew else 1
    if not C.is_cuda:
        C.addmm_(A.float(), B.float(), alpha=alpha, beta=beta)
    elif _ADDS_TO_FLOAT32:
        torch.addmm(C, A, B, out_dtype=torch.float32, alpha=alpha, beta=beta, out=C)
    elif anew:
        torch.mul(torch.mm(A, B, out_dtype=torch.float32), alpha, out=C)
    else:
        C.add_(torch.mm(A, B, out_dtype=torch.float32), alpha=alpha)


def slices(size: int, step: int) -> Iterator[slice]:
    """0 ... size in parts of ``step``."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
