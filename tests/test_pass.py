"""The pass over the data: what is counted, and what comes out of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import oracle
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
    randomised,
    true_energies,
    truth,
    weight_of,
    worst,
)
from pass_cases import FLOAT32, hooked, padding_warnings, sampled, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_energies(kind: str, device: torch.device) -> None:
    c = case(kind)
    found = energies_of(peft_of(c, device), loader(c.samples), c.forward_fn)
    assert_energies(found, truth(kind), FLOAT32)
    for name, energies in truth(kind).items():
        ours, theirs = (torch.argsort(e, stable=True)[:4] for e in (found[name], energies))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert tokens"])
def test_batching_and_padding_do_not_matter(kind: str, batch_size: int, side: str) -> None:
    """The truth has every sample alone: so may no padded position, and no term of one, count."""
    c = case(kind)
    if kind.startswith("bert") and side == "left":
        pytest.skip("absolute positions: padding on the left makes it another model")
    samples = c.samples[::-1] if batch_size == 3 else c.samples
    found = energies_of(peft_of(c), loader(samples, batch_size, side))
    assert_energies(found, truth(kind), FLOAT32)


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


def test_one_row_a_sample_always_counts() -> None:
    c = case("bert class")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rows of their inputs")
        moments = statistics_of(peft_of(c), loader(c.samples)).moments
    assert int(moments["bert.pooler.dense"].input.count) == len(LENGTHS)
    assert int(moments["bert.encoder.layer.0.attention.self.query"].input.count) == sum(LENGTHS)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_full_and_decoder_padded(kind: str) -> None:
    """One side's mask is never put to the other's rows, even where their lengths agree."""
    c = case(kind)
    generator = torch.Generator().manual_seed(0)
    full = [
        s | {"input_ids": torch.randint(3, VOCAB, (9,), generator=generator)} for s in c.samples
    ]
    full = [s | {"attention_mask": torch.ones(9, dtype=torch.int64)} for s in full]
    expected = true_energies(c.model, c.targets, full)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rows of their inputs")
        found = energies_of(peft_of(c), loader(full))
    assert_energies(found, expected, FLOAT32)
    reverse = [
        s | {"labels": torch.randint(3, VOCAB, (9,), generator=generator)} for s in c.samples
    ]
    assert_energies(
        energies_of(peft_of(c), loader(reverse)),
        true_energies(c.model, c.targets, reverse),
        FLOAT32,
    )


def test_decoder_prompt_without_labels_counts() -> None:
    c = case("bart")
    samples = [s | {"decoder_input_ids": s["labels"].roll(1)} for s in c.samples]
    for sample in samples:
        sample["labels"] = torch.cat([torch.tensor([-100]), sample["labels"][1:]])
    expected = true_energies(c.model, c.targets, samples)
    assert_energies(energies_of(peft_of(c), loader(samples)), expected, FLOAT32)


def test_decoder_of_a_classifier_takes_the_encoders_mask() -> None:
    config = copy.deepcopy(case("bart").model.config)
    config.num_labels, config.eos_token_id, config.classifier_dropout = 3, 2, 0.5
    model = randomised(BartForSequenceClassification(config))
    samples = []
    for index, sample in enumerate(case("bart").samples):
        ids = torch.cat([sample["input_ids"], torch.tensor([2])])  # it classifies at the EOS
        mask = torch.ones_like(ids)
        samples.append(
            {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(index % 3)}
        )
    c = Case(model, samples, linears(model))
    expected = true_energies(c.model, c.targets, c.samples)
    assert_energies(energies_of(peft_of(c), loader(samples)), expected, FLOAT32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert masked"])
def test_labels_on_padding_do_not_count(kind: str) -> None:
    """The labels=input_ids of many a data set, padding and all."""
    c = case(kind)
    batch = collate(c.samples)
    labelled = {**batch, "labels": batch["labels"].where(batch["attention_mask"] == 1, 0)}
    if c.shift:  # the first padding token is predicted by the last real one
        ends = batch["attention_mask"].sum(1)
        for row, end in enumerate(ends.tolist()):
            labelled["labels"][row, end : end + 1] = -100
    assert (labelled["labels"] != batch["labels"]).any()
    assert_energies(energies_of(peft_of(c), [labelled]), truth(kind), FLOAT32)


def test_nan_in_padded_rows_does_no_harm(device: torch.device) -> None:
    c = case("perceptron")
    peft_model = peft_of(c, device)
    batches = [collate(c.samples[:4]), collate(c.samples[4:])]
    current: dict[str, Tensor] = {}

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        padded = current["attention_mask"].to(output.device) == 0
        assert padded.any()
        return output.masked_fill(padded.unsqueeze(-1), torch.nan)

    def forward_fn(model: Any, batch: Any) -> Any:
        current.update(batch)
        return mean_and_terms(model, batch)

    hooked(peft_model, "embedding").register_forward_hook(poison)
    assert_energies(energies_of(peft_model, batches, forward_fn), truth("perceptron"), FLOAT32)


def test_rows_that_follow_no_mask_are_named() -> None:
    c = case("experts")
    with pytest.warns(UserWarning, match=r"experts\.0\.0.*attention_mask") as caught:
        statistics_of(peft_of(c), loader(c.samples))
    assert sum("attention_mask" in str(w.message) for w in caught) == 1


def test_frames_of_fixed_length_have_no_padding() -> None:
    """Of Whisper, whose encoder takes no mask: as many frames with every sample."""
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=24, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=3, decoder_attention_heads=3, num_mel_bins=6,
        max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "input_features": torch.randn(6, 20, generator=generator),
            "attention_mask": (torch.arange(20) < 8 + index).long(),
            "labels": sample["labels"],
        }
        for index, sample in enumerate(case("t5").samples)
    ]
    model = randomised(WhisperForConditionalGeneration(config))
    c = Case(model, samples, linears(model, "proj_out"))
    assert padding_warnings(c, list(loader(samples, 4))) == []
    found = energies_of(peft_of(c), loader(samples, 4))
    assert_energies(found, true_energies(model, c.targets, samples), FLOAT32)


def test_frames_that_a_convolution_made_are_named() -> None:
    """Fewer than the mask has, and among them those of what pads the shorter sample."""
    config = Wav2Vec2Config(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=40, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(2, 2),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )  # fmt: skip
    model = randomised(Wav2Vec2ForCTC(config))
    batch = {
        "input_values": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)),
        "attention_mask": (torch.arange(64) < torch.tensor([[64], [40]])).long(),
        "labels": torch.tensor([[3, 4, 5], [3, 4, -100]]),
    }
    c = Case(model, [], linears(model, "lm_head"))
    assert len(padding_warnings(c, [batch], loss_reduction="sum")) == 1


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
