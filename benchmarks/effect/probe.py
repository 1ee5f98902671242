"""A frozen linear probe for every data set of a classifier, and the folder of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from effect.class_task import ClassTask
from effect.kinds import ClassKind, kind_of
from effect.tasks import Row

__all__ = ["fit_probe", "write_folder"]

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_CONSTANT = 1e-6  # of the widest feature's spread
_ROWS = 100  # of a forward


def _fitted(x: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Of mean cross-entropy + penalty / 2 ‖W‖², the minimum by L-BFGS from 0.

    W = V L⁻¹, L Lᵀ = cov(x) / classes + penalty: V's curvature is about 1 in all directions, which
    takes tens of steps where W takes thousands.
    """
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    L = torch.linalg.cholesky(x.T.cov(correction=0) / classes + penalty * eye)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    rows = x @ inverse.T
    V = x.new_zeros(classes, x.shape[1], requires_grad=True)
    b = x.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [V, b],
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(rows, V, b), labels)
        loss = loss + penalty / 2 * (V @ inverse).square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return V.detach() @ inverse, b.detach()


def fit_probe(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: W (classes, d) and b for features (N, d) float64.

    The penalty is of weights for features of unit variance, and that of the least loss on the last
    fifth of the rows when fitted to the others; then all rows are fitted. A feature that is the
    same in all rows, but for rounding, has weight 0.
    """
    mean, spread = x.mean(0), x.std(0)
    spread[spread < _CONSTANT * spread.max()] = torch.inf
    z, cut, labels = (x - mean) / spread, len(x) * 4 // 5, labels.long()

    def held_out(penalty: float) -> float:
        W, b = _fitted(z[:cut], labels[:cut], classes, penalty)
        return float(F.cross_entropy(F.linear(z[cut:], W, b), labels[cut:]))

    W, b = _fitted(z, labels, classes, min(_PENALTIES, key=held_out))
    return W / spread, b - W @ (mean / spread)


@torch.no_grad()
def _features(kind: ClassKind, task: ClassTask, rows: Sequence[Row]) -> Tensor:
    """What the classifier gets, (N, d) float64."""
    parts = [
        task.run(kind.model, task.batch(rows[start : start + _ROWS], kind.device)[0])
        for start in range(0, len(rows), _ROWS)
    ]
    return torch.cat(parts).double()


def _fit_head(kind: ClassKind, count: int) -> None:
    """Give the head, in place, a probe of every data set's first ``count`` training rows."""
    for number, name in enumerate(kind.sets):
        task, own = kind.task(name), kind.groups == number
        first, classes = kind.firsts[name], int(own.sum())
        labels = torch.stack([label for _, label in task.train[:count]]) - first
        W, b = fit_probe(_features(kind, task, task.train[:count]), labels, classes)
        kind.head.weight[own], kind.head.bias[own] = W.float(), b.float()
        logits = F.linear(_features(kind, task, task.test), W, b)
        labels = torch.stack([label for _, label in task.test]) - first
        right, loss = (logits.argmax(1) == labels).double().mean(), F.cross_entropy(logits, labels)
        print(f"{name}: {len(labels)} test rows, loss {loss:.4f}, accuracy {right:.4f}")


def write_folder(
    output: Path,
    config: Any,
    weights: Mapping[str, Tensor],
    labels: Sequence[str],
    *,
    width: int,
    dtype: torch.dtype,
    count: int,
) -> None:
    """OUTPUT/model, a folder of transformers, with probes for the data sets of OUTPUT/data.

    Args:
        config: of the model; it gets the labels.
        weights: by their names in the checkpoint, without the classifier's. Written in ``dtype``;
            the classifier is float32, and fitted to what the rounded weights make of the samples.
        labels: of all classes, "SET/CLASS", those of one data set together.
        width: of what the classifier gets.
        count: how many training samples the probe learns from.
    """
    folder = output / "model"
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.save_pretrained(folder)

    def write(head: Mapping[str, Tensor]) -> None:
        found = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        found |= {f"classifier.{name}": tensor for name, tensor in head.items()}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    write({"weight": torch.zeros(len(labels), width), "bias": torch.zeros(len(labels))})
    kind = kind_of(folder, output / "data", torch.device("cpu"), torch.float32)
    assert isinstance(kind, ClassKind)
    _fit_head(kind, count)
    write(kind.head.state_dict())
