"""The pass over the data: energies against the paper's algorithm, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models import (
    KINDS,
    LENGTHS,
    VOCAB,
    Case,
    Perceptron,
    assert_energies,
    case,
    collate,
    energies_of,
    linears,
    llama,
    loader,
    mean_and_terms,
    observe,
    peft_of,
    true_energies,
    truth,
    weight_of,
)
from passes import FLOAT32, hooked, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


# Against the paper's algorithm.


@pytest.mark.parametrize("kind", KINDS)
def test_energies(kind: str, device: torch.device) -> None:
    c = case(kind)
    found = energies_of(peft_of(c, device), loader(c.samples), c.forward_fn)
    assert_energies(found, truth(kind), FLOAT32)
    for name, energies in truth(kind).items():
        ours, theirs = (torch.argsort(e, stable=True)[:4] for e in (found[name], energies))
        assert torch.equal(ours, theirs), name


def test_counts() -> None:
    """Prompt positions without a label count, padded ones never do."""
    c = case("llama")
    statistics = statistics_of(peft_of(c), loader(c.samples))
    labels = sum(int((s["labels"][1:] != -100).sum()) for s in c.samples)
    assert (statistics.samples, statistics.tokens) == (len(LENGTHS), sum(LENGTHS))
    assert statistics.loss_terms == labels < sum(LENGTHS)
    for moments in statistics.moments.values():
        assert int(moments.input.count) == int(moments.output.count) == sum(LENGTHS)
        assert int(moments.loss_terms) == labels


def test_experts() -> None:
    """Routed rows, and an expert that sees none."""
    c = case("experts")
    statistics = statistics_of(peft_of(c), loader(c.samples, 1))
    unseen = {"experts.3.0", "experts.3.2"}
    assert {n for n, m in statistics.moments.items() if not int(m.input.count)} == unseen
    found = energies_of(peft_of(c), loader(c.samples, 1))
    assert_energies({n: e for n, e in found.items() if n not in unseen}, truth("experts"), FLOAT32)


def test_module_used_twice() -> None:
    c = case("albert")
    moments = statistics_of(peft_of(c), loader(c.samples)).moments
    inside = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    assert int(moments[inside].input.count) == int(moments[inside].output.count)
    assert int(moments[inside].input.count) == 3 * sum(LENGTHS)


def test_samples_cuts_the_last_batch_and_reads_no_further() -> None:
    c = case("llama")

    def batches() -> Iterator[Any]:
        yield collate(c.samples[:3])
        yield collate(c.samples[3:6])
        raise AssertionError("read past the samples asked for")

    statistics = statistics_of(peft_of(c), batches(), samples=5)
    assert (statistics.samples, statistics.tokens) == (5, sum(LENGTHS[:5]))
    found = energies_of(peft_of(c), batches(), samples=5)
    assert_energies(found, true_energies(c.model, c.targets, c.samples[:5], True), FLOAT32)
    with pytest.raises(ValueError, match="no sample"):
        statistics_of(peft_of(c), [])


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_bitwise_the_same_twice(fisher: str, device: torch.device) -> None:
    c = case("llama")
    one, two = (
        statistics_of(peft_of(c, device), loader(c.samples), fisher=fisher) for _ in range(2)
    )
    for name in c.targets:
        for side in ("input", "output"):
            ours, theirs = (getattr(s.moments[name], side).sum.tril() for s in (one, two))
            assert torch.equal(ours, theirs), (name, side)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bitwise_the_same_with_long_attention(dtype: torch.dtype, reentrant: bool | None) -> None:
    """Attention's backward adds with atomics where there are several blocks of keys."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    length = 2048
    model = llama(hidden_size=256, num_key_value_heads=4, max_position_embeddings=length)
    ids = torch.randint(3, VOCAB, (4, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -500:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
    sums = []
    for _ in range(4):
        peft_model = peft_of(Case(model, [], linears(model, "lm_head")), "cuda", dtype)
        if reentrant is not None:
            peft_model.base_model.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        moments = statistics_of(peft_model, [batch]).moments
        sums.append({name: m.output.sum.tril() for name, m in moments.items()})
    for other in sums[1:]:
        for name in sums[0]:
            assert torch.equal(sums[0][name], other[name]), name


# Odds and ends.


def test_layers_on_two_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device beside the CPU")

    class Split(Perceptron):
        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            x = torch.tanh(self.up(self.embedding(input_ids))).to("cuda")
            x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
            return self.head(self.down(x).cpu())

    c = case("perceptron")
    model = Split()
    model.load_state_dict(c.model.state_dict())
    peft_model = peft_of(Case(model, c.samples, c.targets))
    for name in ("twice", "down"):
        hooked(peft_model, name).to("cuda")
    assert_energies(
        energies_of(peft_model, loader(c.samples), mean_and_terms), truth("perceptron"), FLOAT32
    )


def test_moments_of_the_smaller_space_are_what_the_hooks_saw() -> None:
    """The sums themselves, one by one, in every space."""
    c = case("llama")
    seen, _ = observe(c.model, c.targets, c.samples, True)
    statistics = statistics_of(peft_of(c), loader(c.samples))
    spaces = set()
    for name, moments in statistics.moments.items():
        x, g = seen[name]
        W = weight_of(c.model, name).double()
        rows = {"x": x, "y": x @ W.T, "g": g, "h": g @ W}
        for moment in (moments.input, moments.output):
            spaces.add(moment.space)
            expected = rows[moment.space].T @ rows[moment.space]
            scale = expected.diagonal().outer(expected.diagonal()).sqrt()
            error = ((moment.sum - expected).tril().abs() / scale).max()
            assert error < 1e-5, f"{name} in {moment.space}: {error:.3g}"
            assert moment.sum.shape[0] == min(W.shape) or name in statistics.shared_input
    assert spaces == {"x", "y", "g", "h"}
