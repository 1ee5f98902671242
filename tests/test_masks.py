"""Masks: padding never counts, and rows that no mask fits are named."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from filet import FiletConfig
from models import (
    LENGTHS,
    VOCAB,
    Case,
    assert_energies,
    case,
    collate,
    energies_of,
    linears,
    loader,
    mean_and_terms,
    peft_of,
    randomised,
    true_energies,
    truth,
)
from passes import FLOAT32, hooked, of_llama, padded, padding_warnings, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


# Padding.


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


# Masks.


def causal_and_padding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) of queries and keys, boolean or additive, as transformers takes them."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (mask != 0)[:, None, None, :]
    allowed = allowed | torch.eye(length, dtype=torch.bool)  # no row without a key
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_of_queries_and_keys_need_one_of_tokens_beside(side: str, dtype: torch.dtype) -> None:
    batches = [
        {
            **batch,
            "attention_mask": causal_and_padding(batch["attention_mask"], dtype),
            "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0),
            "tokens": batch["attention_mask"],
        }
        for batch in padded(side)
    ]
    assert_energies(of_llama(batches, token_mask="tokens"), truth("llama"), 1e-4)
    assert "tokens" in batches[0]  # the user's batch is as it was
    without = [{k: v for k, v in batch.items() if k != "tokens"} for batch in batches]
    with pytest.raises(ValueError, match=r"mask is (additive, )?of shape \(4, 1, 9, 9\), from"):
        of_llama(without)
    counted_too = of_llama(without, token_mask=None)
    name = "model.layers.0.mlp.down_proj"
    off = ((counted_too[name] - truth("llama")[name]).abs() / truth("llama")[name]).max()
    assert off > 0.1  # which is why it is not done in silence


def test_draws_by_a_mask_of_another_name() -> None:
    """A sample's draw does not depend on its padding, whatever the mask is called."""
    renamed = [
        {"tokens" if key == "attention_mask" else key: value for key, value in batch.items()}
        for batch in padded("right")
    ]
    expected = of_llama(padded("right"), fisher="sampled")
    assert_energies(of_llama(renamed, token_mask="tokens", fisher="sampled"), expected, 1e-4)


def test_no_mask_counts_every_token_where_that_is_said() -> None:
    """Block masks of rows packed without padding: all positions are tokens."""
    samples = case("llama").samples[:4]
    lengths = [len(sample["input_ids"]) for sample in samples]
    row = {key: torch.cat([s[key] for s in samples]).unsqueeze(0) for key in samples[0]}
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    row["labels"][0, starts] = -100  # what would be predicted across a border
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    row["attention_mask"] = allowed[None, None]
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    expected = of_llama(list(loader(samples, 1)))
    assert_energies(of_llama([row], token_mask=None), expected, 1e-4)
    with pytest.raises(ValueError, match=r"FiletConfig\(token_mask=\.\.\.\)"):
        of_llama([row])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.zeros(4, 9) - 1e9, r"additive, of shape \(4, 9\)"),
        (torch.ones(36), r"attention_mask is of shape \(36,\)"),
        ([[1] * 9] * 4, "attention_mask is list"),
    ],
    ids=["additive", "flat", "list"],
)
def test_masks_that_do_not_tell_are_refused(mask: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of_llama([{**padded()[0], "attention_mask": mask}])


def renamed(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name if key == "attention_mask" else key: value for key, value in batch.items()}


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_mask_of_another_name_for_a_forward_fn(fisher: str) -> None:
    def forward_fn(model: Any, batch: Any) -> Any:
        names = {"keep_mask": "attention_mask"}
        return model(**{names.get(key, key): value for key, value in batch.items()})

    batches = [renamed(batch, "keep_mask") for batch in padded()]
    for batch in batches:  # what stands in the padding must not matter
        batch["labels"] = batch["labels"].masked_fill(batch["keep_mask"] == 0, -100)
    named = of_llama(batches, forward_fn, token_mask="keep_mask", fisher=fisher)
    alone = of_llama(list(loader(case("llama").samples, 1)), fisher=fisher)
    assert_energies(named, alone, 1e-4)
    with pytest.warns(UserWarning, match=r"FiletConfig\(token_mask='keep_mask'\)"):
        of_llama(batches, forward_fn, fisher=fisher)
    with pytest.raises(ValueError, match="token_mask='no_such' is not in the batch, which has inp"):
        of_llama(batches, forward_fn, token_mask="no_such", fisher=fisher)


def test_the_decoder_has_a_mask_of_its_own() -> None:
    c = case("t5")
    batch = collate(c.samples[:4])
    mask = torch.ones(4, 1, 9, 9)
    with pytest.raises(ValueError, match=r"decoder_attention_mask is of shape \(4, 1, 9, 9\)"):
        energies_of(peft_of(c), [{**batch, "decoder_attention_mask": mask}])


def test_token_mask_is_a_name() -> None:
    with pytest.raises(ValueError, match="token_mask=3; expected a name, or None"):
        FiletConfig(token_mask=3)  # type: ignore[arg-type]
