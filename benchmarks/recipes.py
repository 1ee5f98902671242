"""Initialisations that PEFT does not have, by their published recipes, in plain torch.

Each takes the weight of one layer, W (m, n) = (out, in), computes in float32 and mutates nothing.
s is PEFT's scaling of the adapter; A (r, n) and B (m, r) are float32. And statistics of nothing,
for what does not depend on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from filet import Statistics
from filet.collect.hooks import empty_moments
from filet.model.fingerprint import fingerprints
from filet.model.targets import find_targets

__all__ = [
    "AsWritten",
    "dash_choice",
    "dash_directions",
    "filet_as_written",
    "milora",
    "random_statistics",
    "second_moment",
]

_VECTORS = 64  # of random statistics


def second_moment(rows: Tensor) -> Tensor:
    """XᵀX of rows (T, d) in float32, as the library gives it."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    return rows.T.float() @ rows.float()


def milora(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """MiLoRA: the r smallest singular triplets become the adapter (arXiv 2406.09044, section 3).

    W = U Σ Vᵀ;  s B A = U_r Σ_r V_rᵀ of the smallest,  A = (Σ_r / s)^½ V_rᵀ,  B = U_r (Σ_r / s)^½,
    with the scaling as in Chongjie-Si/Subspace-Tuning, loralib/loralib/layers_MiLoRA.py.

    Returns A, B and W_res = W − s B A in W's dtype.
    """
    U, sigma, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (sigma[-rank:] / scaling).sqrt()
    A, B = root.unsqueeze(1) * Vh[-rank:], U[:, -rank:] * root
    return A, B, (W.float() - scaling * B @ A).to(W.dtype)


def dash_directions(W: Tensor, delta: Tensor, count: int = 8) -> tuple[Tensor, Tensor]:
    """LoRA-Dash, between its two phases: the directions that changed most (arXiv 2409.01035).

    W = U Σ Vᵀ; ΔW (m, n) is what the adapter learned in the first 100 steps. Of the rates
    |u_iᵀ ΔW v_i| / σ_i the largest ``count`` (8) are taken, as in Chongjie-Si/Subspace-Tuning,
    CR_MR/peft/src/peft/tuners/lora-dash.py, which forms Uᵀ ΔW V in full as is done here.

    Returns their left (m, count) and right (count, n) singular vectors.
    """
    return dash_choice(torch.linalg.svd(W.float(), full_matrices=False), delta, count)


def dash_choice(
    svd: tuple[Tensor, Tensor, Tensor], delta: Tensor, count: int = 8
) -> tuple[Tensor, Tensor]:
    """:func:`dash_directions` by W's singular value decomposition U, σ, Vᵀ."""
    U, sigma, Vh = svd
    change = torch.diag(U.T @ delta.to(U.dtype) @ Vh.T)
    top = torch.topk(change.abs() / sigma.abs(), count).indices
    return U[:, top], Vh[top]


def filet_as_written(
    W: Tensor, S_X: Tensor, S_Y: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FILet, Algorithm 1 of arXiv 2605.01046 step by step: A, B and W_res in W's dtype.

    V̂ = normalize_columns(WᵀW), Û = normalize_columns(W V̂),
    E = diag(V̂ᵀ S_X V̂) ⊙ diag(Ûᵀ S_Y Û), of which the r smallest are taken.
    """
    w = W.float()
    V = nn.functional.normalize(w.T @ w, dim=0)
    U = nn.functional.normalize(w @ V, dim=0)
    energies = (V * (S_X @ V)).sum(0) * (U * (S_Y @ U)).sum(0)
    chosen = torch.topk(energies, rank, largest=False).indices
    root = energies[chosen].sqrt()
    A, B = root.unsqueeze(1) * V[:, chosen].T, U[:, chosen] * root
    return A, B, (w - scaling * B @ A).to(W.dtype)


class AsWritten:
    """FILet's statistics as written: hooks that add x xᵀ (n, n) and g gᵀ (m, m) of every layer.

    In full, not shared between layers, float32, by ``C.add_(mm → fp32)``; sums over tokens, of the
    gradient of whatever loss goes backward.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [self._watch(name, module) for name, module in layers.items()]

    def _watch(self, name: str, module: nn.Linear) -> Any:
        m, n = module.weight.shape
        device = module.weight.device
        S_X, S_Y = torch.zeros(n, n, device=device), torch.zeros(m, m, device=device)
        self.sums[name] = (S_X, S_Y)

        def add(C: Tensor, rows: Tensor) -> None:
            C.add_(second_moment(rows.detach().flatten(0, -2)))

        def forward(module: Any, args: Any, output: Tensor) -> None:
            add(S_X, args[0])
            output.register_hook(lambda gradient: add(S_Y, gradient))

        return module.register_forward_hook(forward)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def random_statistics(peft_model: Any, adapter_name: str = "default") -> Statistics:
    """Statistics of random vectors, for every layer of an adapter that FILet can initialise."""
    targets, _ = find_targets(peft_model, adapter_name)
    generator = torch.Generator().manual_seed(0)
    moments = {name: empty_moments(target) for name, target in targets.items()}
    for each in moments.values():
        for side in (each.input, each.output):
            rows = torch.randn(_VECTORS, side.sum.shape[0], generator=generator)
            side.update(rows.to(side.sum))
        each.loss_terms.fill_(_VECTORS)
    hashes = fingerprints({name: target.weight for name, target in targets.items()})
    counts = {"samples": 1, "tokens": _VECTORS, "loss_terms": _VECTORS}
    return Statistics(moments, hashes, {}, **counts, fisher="empirical")
