"""Every CUDA kernel at small sizes, for compute-sanitizer; each is checked against float64.

make sanitize
"""

from __future__ import annotations

import torch

from filet_kernels import Moments, fisher_energies
from filet_kernels.extension import cuda_extension
from filet_kernels.quadform import quadform_cuda
from filet_kernels.syrk import turns_on

# Kernels and their sizes: csrc/include/filet/syrk.h.
SYRK_PLANS = (
    ("share", 2), ("share", 3), ("grid", 128), ("grid", 160), ("grid", 192), ("pairs", 0),
)  # fmt: skip


def syrk(n: int, tokens: int, kernel: str, size: int) -> None:
    extension = cuda_extension()
    plan = extension.SyrkPlan(getattr(extension.SyrkKernel, kernel), size)
    X = torch.randn(tokens, n, device="cuda").bfloat16()
    C = torch.zeros(n, n, device="cuda")
    for _ in range(2):
        extension.syrk_sm90(
            c=C.data_ptr(), stride_c=n, x=X.data_ptr(), stride_x=n, n=n, tokens=tokens, alpha=1.0,
            half=False, plan=plan, flags=turns_on(X.device).data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    error = (C.double() - 2 * X.double().T @ X.double()).tril().abs().max()
    assert error < 1e-3, f"syrk n={n}, T={tokens}, {kernel} {size}: error {error}"


def quadform(n: int, p: int, dtype: torch.dtype, precision: str, portable: bool) -> None:
    S, V = torch.randn(n, n, device="cuda"), torch.randn(n, p, device="cuda").to(dtype)
    low = S.tril().double()
    full, v = low + low.tril(-1).T, V.double()
    # So little workspace that the columns of V come in parts.
    error = (quadform_cuda(S, V, precision, 2**20, portable) - (v * (full @ v)).sum(0)).abs()
    bound = (v.abs() * (full.abs() @ v.abs())).sum(0) * (5e-7 if precision == "accurate" else 2e-2)
    assert (error <= bound).all(), f"quadform {n} × {p}, {dtype}, {precision}: error {error.max()}"


def energies(m: int, n: int, shared: bool = False) -> None:
    leader = Moments.zeros((n, n), device="cuda").input if shared else None
    moments = Moments.zeros((m, n), device="cuda", input=leader)
    for side in (moments.input, moments.output):
        side.update(torch.randn(300, side.sum.shape[0], device="cuda").bfloat16())
    moments.loss_terms += 300
    W = torch.randn(m, n, device="cuda").bfloat16()
    truth = fisher_energies(W.double(), moments)
    error = ((fisher_energies(W, moments) - truth) / truth).abs().max()
    assert error < 1e-4, f"energies {m} × {n}: error {error}"


def main() -> None:
    for n, tokens in ((520, 150), (136, 70)):
        for plan in SYRK_PLANS:
            syrk(n, tokens, *plan)
    for dtype in (torch.bfloat16, torch.float32):
        for precision in ("fast", "accurate"):
            for portable in (False, True):
                quadform(300, 600, dtype, precision, portable)
    # So many tasks that S is packed behind the products (132 multiprocessors).
    quadform(2056, 4608, torch.bfloat16, "fast", False)
    energies(130, 264)
    energies(130, 264, shared=True)
    energies(264, 136)
    torch.cuda.synchronize()
    print("every CUDA kernel ran")


if __name__ == "__main__":
    main()
