"""Orthonormal columns by Cholesky factors of Gram matrices.

That takes no wait for a GPU and a tenth of Householder's time there. A shift of the Gram matrix
lets columns be dependent; repeated three times it is orthonormal to rounding (Fukaya et al., 2020,
of shifted Cholesky QR).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["added", "gram_schmidt"]


def added(X: Tensor, V: Tensor) -> Tensor:
    """An orthonormal basis of what the columns of X add to those of V, which are orthonormal.

    The j-th is what the j-th column of X adds to V and the columns before it. Where one adds
    nothing the result is not orthonormal: whoever uses it looks.
    """
    shift = 8 * max(X.shape[1], X.shape[0] ** 0.5) * torch.finfo(X.dtype).eps
    for _ in range(3):
        if V.shape[1]:  # else three launches each time, of products with nothing
            X = X - V @ (V.T @ X)
        gram = X.T @ X
        gram.diagonal().add_(shift * gram.diagonal().amax())
        factor, _ = torch.linalg.cholesky_ex(gram)
        X = torch.linalg.solve_triangular(factor.T, X, upper=True, left=False)
    return X


def gram_schmidt(V: Tensor) -> Tensor:
    """Q (n, r) of V = Q R with a positive diagonal, for columns of length 1, in float64.

    A column that adds nothing but rounding to those before it becomes some direction of length 1,
    or stays as it is; what follows it is orthogonal to the direction that was tried.
    """
    V = V.double()
    Q = added(V, V[:, :0])
    lengths = torch.linalg.vector_norm(Q, dim=0)
    # Nothing waits for a GPU. What is not a number is not larger.
    return torch.where(lengths > 0.5, Q / lengths, V)
