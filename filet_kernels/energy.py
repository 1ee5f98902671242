"""Fisher energies of a layer's candidate directions, from its weight and two second moments.

The paper (arXiv 2605.01046, Algorithm 1) scores direction i of W (m, n) = (out, in) with
    V̂ = normalize_columns(WᵀW),   Û = normalize_columns(W V̂),
    E_i = (v̂_iᵀ S_X v̂_i) (û_iᵀ S_Y û_i).
With G = WᵀW, K = WWᵀ, y = Wx and h = Wᵀg, the two factors are also
    e_x = diag(G S_X G) / diag(G²)         = diag(Wᵀ C_y W) / diag(G²),
    e_y = diag((KW)ᵀ S_Y (KW)) / diag(G³)  = diag(G C_h G) / diag(G³),
so each moment may be taken in the smaller of the two spaces, and V̂, Û need not exist.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from filet_kernels.moments import Moments, SecondMoment
from filet_kernels.quadform import Precision, quadform_diag

__all__ = ["Normalization", "fisher_energies"]

Normalization = Literal["mean", "sum"]


def fisher_energies(
    W: Tensor,
    moments: Moments,
    *,
    normalization: Normalization = "mean",
    precision: Precision = "accurate",
) -> Tensor:
    """Fisher energy E_i of every candidate direction i of a layer.

    Args:
        W: (m, n) = (out, in), any floating dtype, any strides; on the moments' device.
        moments: the layer's second moments, in any of the four spaces.
        normalization: "mean", the paper's: g is the gradient of the mean loss over all the loss
            terms that the moments saw; "sum": of the summed loss. They differ by the factor
            ``loss_terms²``, so the ranking is the same.
        precision: of the quadratic forms, see :func:`filet_kernels.quadform_diag`.

    Returns:
        (n,) float64, non-negative (a rounding below 0 becomes 0). NaN marks what is no candidate:
        a zero column of W has no direction. A layer that saw no token has energy 0 everywhere.
        Nothing is mutated; deterministic on the same device.

    Raises:
        ValueError: moments of another shape than W, or an unknown normalization.
    """
    m, n = moments.shape
    if W.shape != (m, n):
        raise ValueError(f"W has shape {tuple(W.shape)}; expected ({m}, {n}), as its moments")
    if normalization not in ("mean", "sum"):
        raise ValueError(f"normalization={normalization!r}; expected 'mean' or 'sum'")
    W = W.detach().double()
    directions = {"y": W}
    if n <= m or moments.input.space == "x" or moments.output.space == "h":
        directions["x"] = directions["h"] = W.T @ W
    # W G = K W, through the smaller of the two Gram matrices.
    WG = directions["g"] = W @ directions["x"] if n <= m else (W @ W.T) @ W

    def mean_form(moment: SecondMoment) -> Tensor:
        form = quadform_diag(moment.sum, directions[moment.space], precision=precision)
        return form.clamp_min_(0) / moment.count.clamp_min(1)

    input_energy = mean_form(moments.input) / (W * WG).sum(0)  # diag(G²) = diag(Wᵀ K W)
    output_energy = mean_form(moments.output) / (WG * WG).sum(0)  # diag(G³)
    energies = input_energy * output_energy
    if normalization == "mean":
        energies = energies / moments.loss_terms.clamp_min(1).double() ** 2
    return torch.where((W != 0).any(0), energies, torch.nan)
