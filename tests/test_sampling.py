"""Labels drawn from the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

import oracle
from filet import FiletConfig
from filet.loss.sampling import uniform
from models import (
    Case,
    Sample,
    assert_energies,
    case,
    energies_of,
    loader,
    mean_and_terms,
    peft_of,
    truth,
    worst,
)
from passes import FLOAT32, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


def sampled(c: Case, samples: list[Sample], batch_size: int, side: str, seed: int = 0) -> Any:
    return energies_of(peft_of(c), loader(samples, batch_size, side), fisher="sampled", seed=seed)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert class", "vit", "t5", "bart"])
def test_sampled_labels_do_not_depend_on_the_batch(kind: str) -> None:
    c = case(kind)
    alone = sampled(c, c.samples, 1, "right")
    assert_energies(sampled(c, c.samples, 5, "right"), alone, FLOAT32)
    assert_energies(sampled(c, c.samples[::-1], 4, "right"), alone, FLOAT32)
    if c.shift:
        assert_energies(sampled(c, c.samples, 4, "left"), alone, FLOAT32)
        drawn = statistics_of(peft_of(c), loader(c.samples), fisher="sampled").loss_terms
        assert drawn == sum(int((s["labels"][1:] != -100).sum()) for s in c.samples)
    assert worst(sampled(c, c.samples, 1, "right", seed=1), alone)[0] > 0.05
    assert worst(truth(kind), alone)[0] > 0.05


def test_sampled_labels_give_the_true_fisher() -> None:
    """For logits z = head(x) of a linear layer, E[g gᵀ | x] = diag(p) − p pᵀ, p = softmax(z)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].weight.data.copy_(torch.randn(5, 6, generator=generator))
    x = torch.randn(4, 6, generator=generator)
    # The draw of a sample is its content's: 1000 of each that differ a little.
    rows = x.repeat(1000, 1) * (1 + 1e-4 * torch.rand(4000, 6, generator=generator))
    # Labels that the model does not believe in: the empirical Fisher is another one.
    labels = model(rows).argmin(-1)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"]))
    batch = [{"rows": rows, "labels": labels}]

    def forward_fn(model: Any, batch: Any) -> Any:
        logits = model(batch["rows"])
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, batch["labels"]))

    # The mean of (uᵀg)² over the draws, and its standard error, for every direction u.
    W = model[0].weight.detach().double()
    V = oracle.normalize_columns(W.T @ W)
    U = oracle.normalize_columns(W @ V)
    p = model(x).softmax(-1).double().detach()
    squares = ((p.unsqueeze(1) - torch.eye(5)) @ U).square()  # (4 inputs, 5 labels, 6 directions)
    mean = (p.unsqueeze(2) * squares).sum(1).mean(0)
    variance = (p.unsqueeze(2) * squares.square()).sum(1).mean(0) - mean**2
    input_energy = (V * (x.double().T @ x.double() @ V)).sum(0) / 4 / 4000**2
    found = energies_of(peft_model, batch, forward_fn, fisher="sampled")["0"]
    assert ((found / input_energy - mean).abs() < 4 * (variance / 4000).sqrt()).all()
    empirical = energies_of(peft_model, batch, forward_fn)["0"]
    assert ((empirical / input_energy - mean).abs() > 20 * (variance / 4000).sqrt()).any()


def test_sampled_needs_logits_and_labels() -> None:
    c = case("perceptron")
    with pytest.raises(ValueError, match=r"fisher='sampled'.*\.logits"):
        statistics_of(peft_of(c), loader(c.samples), mean_and_terms, fisher="sampled")


def test_the_draw_of_a_sample_stays_what_it_is() -> None:
    """Of text and of pictures, from one version to the next."""
    config = FiletConfig(fisher="sampled", seed=3)
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    text = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": ids,
        "token_type_ids": ids * 0,
        "position_ids": torch.arange(4).expand(2, 4),
    }
    pictures = {"pixel_values": torch.arange(24.0).view(2, 3, 2, 2), "labels": torch.arange(2)}
    expected = [0.11264118215436747, 0.5553817246628461, 0.7108794740072868, 0.703958782999395]
    found = [float(uniform(config, batch, i, 1)) for batch in (text, pictures) for i in range(2)]
    assert found == expected
