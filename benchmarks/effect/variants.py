"""Adapters whose parameters are not A and B alone, of K members at once.

Each is an :class:`effect.population.Adapter`; :data:`VARIANTS` has them by name, with where they
start. Their scaling is 1. DoRA and KaSA are as in PEFT 0.21.2. What is asked of the training
besides: :func:`penalties` for KaSA, :func:`launch` for LoRA-Dash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn

from effect.context import Context
from effect.of_peft import adapted, starts_of
from effect.population import Lora, PopulationLinear
from effect.start import Start
from recipes import dash_choice

__all__ = [
    "VARIANTS",
    "Dash",
    "Dora",
    "Kasa",
    "KasaStart",
    "Neat",
    "Variant",
    "launch",
    "penalties",
]

_DIRECTIONS = 8  # that LoRA-Dash launches


class Dora(nn.Module):
    """DoRA: y = m ⊙ (W + B A) x / ‖W + B A‖ + b, norms of rows (arXiv 2402.09353).

    The magnitude m (K, out) trains, and is ‖W + B A‖ at the start, so that the function is LoRA's.
    No gradient goes through the norm, as the paper's section 4.3 and PEFT have it. A start that
    subtracts is refused.
    """

    def __init__(self, weight: Tensor, starts: Sequence[Start]) -> None:
        super().__init__()
        self.weight = weight
        self.lora = Lora(weight, starts)
        if self.lora.A0.shape[1]:
            raise ValueError("a start subtracts from W; expected starts without A0 and B0 for DoRA")
        self.magnitude = nn.Parameter(self._norms())
        self.groups = {"A": [self.lora.A, self.magnitude], "B": [self.lora.B]}

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """‖W + B A‖ of every row, (K, m), from products with r columns."""
        W, A, B = self.weight.float(), self.lora.A, self.lora.B
        crossed = 2 * (W @ A.mT) + B @ (A @ A.mT)
        return (W.square().sum(1) + (crossed * B).sum(2)).clamp_min_(0).sqrt_()

    @torch.no_grad()
    def load(self, starts: Sequence[Start]) -> None:
        self.lora.load(starts)
        self.magnitude.copy_(self._norms())

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        gain = self.magnitude / self._norms()
        return self.lora.A.to(dtype), (gain.unsqueeze(2) * self.lora.B).to(dtype), gain


@dataclass(frozen=True, eq=False)
class KasaStart(Start):
    """A0 and B0 are what KaSA truncates of W; ``diag`` (r,) the singular values it trains."""

    diag: Tensor = field(kw_only=True)


class Kasa(nn.Module):
    """KaSA: y = W_p x + B diag(d) A x (arXiv 2412.06071).

    W_p is W without its r smallest singular triplets, subtracted beside W. d (K, r) trains.
    """

    def __init__(self, weight: Tensor, starts: Sequence[KasaStart]) -> None:
        super().__init__()
        self.lora = Lora(weight, starts)
        self.diag = nn.Parameter(self.lora.A.new_empty(self.lora.A.shape[:2]))
        self.groups = {"A": [self.lora.A, self.diag], "B": [self.lora.B]}
        self.load(starts)

    @torch.no_grad()
    def load(self, starts: Sequence[KasaStart]) -> None:
        self.lora.load(starts)
        for k, start in enumerate(starts):
            if not isinstance(start, KasaStart):
                raise TypeError(f"a {type(start).__name__} has no diag; expected a KasaStart")
            self.diag[k] = start.diag

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        A, B, _ = self.lora.factors(dtype)
        rest = A.shape[1] - self.diag.shape[1]
        d = nn.functional.pad(self.diag, (0, rest), value=1.0)
        return d.unsqueeze(2).to(dtype) * A, B, None

    def penalty(self) -> Tensor:
        """β ‖d‖² + γ (‖BᵀB − I‖ + ‖A Aᵀ − I‖) of every member, (K,), with PEFT's β and γ."""
        A, B, its = self.lora.A, self.lora.B, KasaConfig()
        eye = torch.eye(A.shape[1], device=A.device)
        off = torch.linalg.matrix_norm(B.mT @ B - eye) + torch.linalg.matrix_norm(A @ A.mT - eye)
        return its.beta * self.diag.square().sum(1) + its.gamma * off


class Neat(nn.Module):
    """NEAT: y = (W + relu(W Θ₁) Θ₂) x + b, Θ₁ (n, r), Θ₂ (r, n) (arXiv 2410.01870).

    Θ₂ = 0 at the start and Θ₁ᵀ is the start's A; with LoRA's default that is Kaiming's uniform
    draw. The distribution that the paper draws Θ₁ from was not at hand.
    """

    def __init__(self, weight: Tensor, starts: Sequence[Start]) -> None:
        super().__init__()
        self.weight = weight
        shape = (len(starts), *starts[0].A.shape)
        self.first = nn.Parameter(weight.new_empty(shape, dtype=torch.float32))  # Θ₁ᵀ
        self.second = nn.Parameter(torch.empty_like(self.first))
        self.groups = {"A": [self.first], "B": [self.second]}
        self.load(starts)

    @torch.no_grad()
    def load(self, starts: Sequence[Start]) -> None:
        self.second.zero_()
        for k, start in enumerate(starts):
            self.first[k] = start.A

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = torch.relu(self.weight.to(dtype) @ self.first.to(dtype).mT)
        return self.second.to(dtype), hidden, None


class Dash(nn.Module):
    """LoRA-Dash: LoRA first, then also 8 of W's own directions, ΔW = B A + Σ_i δ_i u_i v_iᵀ.

    :meth:`launch` chooses the directions, which then are fixed; δ (K, 8) trains from 0, beside A
    and B (arXiv 2409.01035, see :func:`recipes.dash_directions`). Before it they are 0 and δ has no
    gradient, so that the shapes are the same all along.
    """

    def __init__(self, weight: Tensor, starts: Sequence[Start]) -> None:
        super().__init__()
        (m, n), K = weight.shape, len(starts)
        self.weight = weight
        self.lora = Lora(weight, starts)
        self.delta = nn.Parameter(self.lora.A.new_zeros(K, _DIRECTIONS))
        self.left = weight.new_zeros(K, m, _DIRECTIONS)
        self.right = weight.new_zeros(K, _DIRECTIONS, n)
        self.groups = {"A": [self.lora.A, self.delta], "B": [self.lora.B]}
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def load(self, starts: Sequence[Start]) -> None:
        self.lora.load(starts)
        for tensor in (self.delta, self.left, self.right):
            tensor.zero_()

    @torch.no_grad()
    def launch(self) -> None:
        """The directions whose singular value B A changed most, relative to it."""
        if self._svd is None:  # W's, the same for every population
            self._svd = torch.linalg.svd(self.weight.float(), full_matrices=False)
        for k, (A, B) in enumerate(zip(self.lora.A, self.lora.B, strict=True)):
            self.left[k], self.right[k] = dash_choice(self._svd, B @ A, _DIRECTIONS)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        A, B, _ = self.lora.factors(dtype)
        moved = self.delta.unsqueeze(1).to(dtype) * self.left
        return torch.cat([A, self.right], 1), torch.cat([B, moved], 2), None


def penalties(layers: Mapping[str, PopulationLinear]) -> Tensor | None:
    """What is added to every member's loss, (K,), or None where these adapters have nothing."""
    found = [x.adapter.penalty() for x in layers.values() if isinstance(x.adapter, Kasa)]
    return torch.stack(found).sum(0) if found else None


def launch(layers: Mapping[str, PopulationLinear]) -> None:
    """To be called once, after 40% of the steps: the paper has 100, of 250 here."""
    for layer in layers.values():
        if isinstance(layer.adapter, Dash):
            layer.adapter.launch()


def _kasa_starts(context: Context) -> dict[str, KasaStart]:
    """A, B and d of PEFT's layers, and the r smallest singular triplets of W, which it drops."""
    layers, found = adapted(context, "kasa").base_model.model, {}
    for name, (U, sigma, Vh) in context.singular.items():
        its = layers.get_submodule(name)
        A, B = (x["default"].weight.detach() for x in (its.lora_A, its.lora_B))
        last = slice(-context.rank, None)
        B0 = U[:, last] * sigma[last]
        diag = its.lora_diag["default"].detach()
        found[name] = KasaStart(A, B, Vh[last].float(), B0.float(), diag=diag)
    return found


class Variant(NamedTuple):
    """``adapter(W, starts of a layer)``, and the starts of all layers."""

    adapter: Callable[[Tensor, Any], Any]
    starts: Callable[[Context], Mapping[str, Start]]


_LORA = partial(starts_of, method="lora")
VARIANTS: dict[str, Variant] = {
    "dora": Variant(Dora, _LORA),
    "kasa": Variant(Kasa, _kasa_starts),
    "neat": Variant(Neat, _LORA),
    "lora-dash": Variant(Dash, _LORA),
}
