"""What the hooks see: inputs written to or shared, recomputed forwards, NaN and infinity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CTRLConfig,
    CTRLLMHeadModel,
    GitConfig,
    GitForCausalLM,
)

from models import (
    LENGTHS,
    VOCAB,
    Case,
    Perceptron,
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
from passes import FLOAT32, assert_unchanged, hooked, padding_warnings, snapshot, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


# Embeddings that the model writes to.

_SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}

_TOWER = {**_SMALL, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}

_SMALL |= {"vocab_size": VOCAB, "num_hidden_layers": 2, "pad_token_id": 0}


class Marked(Perceptron):
    """Marks the positions of a token in its embeddings."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        x[input_ids == 5] = 1.0
        return self.head(self.down(self.up(x)))


def writing(kind: str) -> Case:
    samples = copy.deepcopy(case("llama").samples)
    if kind == "ctrl":
        config = CTRLConfig(
            vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, dff=40, n_positions=64
        )
        model = randomised(CTRLLMHeadModel(config))
        return Case(model, samples, linears(model, "lm_head"), shift=True)
    if kind == "marked":
        c = case("perceptron")
        return Case(randomised(Marked()), c.samples, ["up"], forward_fn=mean_and_terms)
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        sample["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
    if kind == "git":
        model = randomised(GitForCausalLM(GitConfig(vision_config=_TOWER, **_SMALL)))
        # Of one length: the mask that it makes of pictures and text is not the batch's.
        samples = [sample for sample in samples if len(sample["input_ids"]) > 6]
        samples = [{k: v[:7] if v.dim() == 1 else v for k, v in s.items()} for s in samples]
    else:
        text = {**_SMALL, "label_smoothing": 0.0, "encoder_hidden_size": 24, "projection_dim": 24}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
        config = BlipConfig(text_config=text, vision_config={**_TOWER, "projection_dim": 24})
        model = randomised(BlipForConditionalGeneration(config))
    targets = [name for name in linears(model) if name.endswith(("query", "value"))]
    return Case(model, samples, targets, shift=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    [
        ("ctrl", False),
        ("blip", False),
        ("blip", True),
        ("git", False),
        ("git", True),
        ("marked", False),
    ],
)
def test_embeddings_that_are_written_to(kind: str, checkpointed: bool) -> None:
    c = writing(kind)
    peft_model = peft_of(c)
    model = peft_model.base_model.model
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    settings = {"loss_reduction": "mean"} if kind == "git" else {}  # of the text behind the image
    found = energies_of(peft_model, loader(c.samples), c.forward_fn, **settings)
    if kind == "git":
        expected = energies_of(peft_of(c), loader(c.samples, 1), **settings)
    else:
        expected = true_energies(c.model, c.targets, c.samples, c.shift)
    assert_energies(found, expected, FLOAT32)


def test_keys_and_values_of_pictures_have_no_padding() -> None:
    c = writing("blip")
    assert any("crossattention.self.value" in name for name in c.targets)
    assert padding_warnings(c, list(loader(c.samples))) == []


class Between(nn.Module):
    """Two linears, and their input is another in between: the same tensor, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = True
        self.embedding = nn.Embedding(VOCAB, 10)
        self.a, self.b = nn.Linear(10, VOCAB), nn.Linear(10, VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        y = self.a(x)
        x = x.mul_(input_ids.unsqueeze(-1)) if self.writes else x * input_ids.unsqueeze(-1)
        return y + self.b(x)


def test_an_input_that_was_written_to_is_not_shared() -> None:
    c = case("perceptron")
    model = randomised(Between())
    other = copy.deepcopy(model)
    other.writes = False
    found, expected = (
        energies_of(peft_of(Case(each, [], ["a", "b"])), loader(c.samples), mean_and_terms)
        for each in (model, other)
    )
    assert_energies(found, expected, 0)


# Gradient checkpointing, dropout, training flags.


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert tokens", "vit", "t5", "bart"])
def test_gradient_checkpointing(kind: str, reentrant: bool, when: str) -> None:
    """In train mode and with dropout in the config: the energies of the eval mode."""
    c = case(kind)
    model = copy.deepcopy(c.model).train()
    options = {"use_reentrant": reentrant}
    lora = LoraConfig(r=4, target_modules=c.targets)
    if when == "before":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        peft_model = get_peft_model(model, lora)
    else:
        peft_model = get_peft_model(model, lora)
        peft_model.base_model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=options
        )
    recomputed = []
    first = hooked(peft_model, c.targets[0])
    first.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    found = energies_of(peft_model, loader(c.samples))
    assert len(recomputed) == 6, "the layers were not checkpointed: three batches, twice each"
    assert_energies(found, truth(kind), FLOAT32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_dropout_is_off(kind: str, training: bool) -> None:
    c = case(kind)
    peft_model = peft_of(c).train(training)
    # The test would be empty if dropout did nothing in train mode.
    batch = collate(c.samples[:4])
    with torch.no_grad():
        one, two = (peft_model(**batch).loss for _ in range(2))
    assert (one != two) == training
    assert_energies(energies_of(peft_model, loader(c.samples)), truth(kind), FLOAT32)


# Shared inputs.


def test_shared_inputs() -> None:
    c = case("llama")
    statistics = statistics_of(peft_of(c), loader(c.samples))
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    moments = statistics.moments
    assert moments[f"{attention}k_proj"].input is moments[f"{attention}q_proj"].input
    assert moments[f"{attention}v_proj"].input is moments[f"{attention}q_proj"].input
    assert moments[f"{mlp}up_proj"].input is moments[f"{mlp}gate_proj"].input
    assert len({id(m.input) for m in moments.values()}) == 2 * 4  # q/k/v, o, gate/up, down
    assert statistics.shared_input == {
        f"model.layers.{layer}.{follower}": f"model.layers.{layer}.{leader}"
        for layer in (0, 1)
        for follower, leader in (
            ("self_attn.k_proj", "self_attn.q_proj"),
            ("self_attn.v_proj", "self_attn.q_proj"),
            ("mlp.up_proj", "mlp.gate_proj"),
        )
    }


def test_no_shared_inputs() -> None:
    c = case("llama")
    statistics = statistics_of(peft_of(c), loader(c.samples), share_inputs=False)
    assert statistics.shared_input == {}
    assert len({id(m.input) for m in statistics.moments.values()}) == len(c.targets)
    assert statistics.moments["model.layers.0.self_attn.k_proj"].input.space == "y"
    found = energies_of(peft_of(c), loader(c.samples), share_inputs=False)
    assert_energies(found, truth("llama"), FLOAT32)


@pytest.mark.parametrize("share", [True, False])
def test_each_side_has_the_smaller_matrix(share: bool) -> None:
    """As docs/adapters.md says of the table's column "moments"."""
    statistics = statistics_of(peft_of(case("llama")), loader(case("llama").samples),
                               share_inputs=share)  # fmt: skip
    found = set()
    for name, moments in statistics.moments.items():
        m, n = moments.shape
        shares = name in statistics.shared_input
        assert moments.input.space == ("y" if m < n and not shares else "x"), name
        assert moments.output.space == ("h" if m > n else "g"), name
        found.add((m > n, m < n, shares))
    assert len(found) == (5 if share else 3)


class Fickle(nn.Module):
    """Two linears that take the same tensor in the first call and not in the later ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.embedding = nn.Embedding(VOCAB, 10)
        self.a, self.b = nn.Linear(10, VOCAB), nn.Linear(10, VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        self.calls += 1
        if self.calls == 1:
            return self.a(x) + self.b(x)
        if self.how == "copy":
            return self.a(x) + self.b(x.clone())
        return self.a(x) if self.how == "leader alone" else self.b(x)


@pytest.mark.parametrize("how", ["copy", "leader alone", "follower alone"])
def test_sharing_that_changes_is_an_error(how: str) -> None:
    c = case("perceptron")
    fickle = Case(randomised(Fickle(how)), c.samples, ["a", "b"])
    with pytest.raises(ValueError, match=r"b took the same input.*share_inputs=False"):
        statistics_of(peft_of(fickle), loader(c.samples), mean_and_terms)
    statistics = statistics_of(
        peft_of(fickle), loader(c.samples), mean_and_terms, share_inputs=False
    )
    expected = {
        "copy": (12, 12),
        "leader alone": (12, 4),
        "follower alone": (4, 12),
    }[how]
    tokens = {4: sum(LENGTHS[:4]), 12: sum(LENGTHS)}
    for name, samples in zip("ab", expected, strict=True):
        assert int(statistics.moments[name].input.count) == tokens[samples]


# NaN and infinity.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activation_names_module_and_batch(
    bad: float, at: int, dtype: torch.dtype, device: torch.device
) -> None:
    c = case("llama")
    peft_model = peft_of(c, device, dtype)
    before = snapshot(peft_model)
    name = "model.layers.1.mlp.down_proj"  # in the space of y
    calls = []

    def spoil(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        calls.append(0)
        if len(calls) != at + 1:
            return None
        x = args[0].clone()
        x[0, 1, 2] = bad
        return (x, *args[1:])

    handle = hooked(peft_model, f"{name}.base_layer").register_forward_pre_hook(spoil)
    with pytest.raises(FloatingPointError, match=rf"^{name}: its output .* batch {at} "):
        statistics_of(peft_model, loader(c.samples))
    handle.remove()
    assert_unchanged(peft_model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_names_module_and_batch(bad: float, device: torch.device) -> None:
    """The module nearest to the loss: all below it received what it passed on."""
    c = case("llama")
    calls = []

    def forward_fn(model: Any, batch: Any) -> Any:
        output = model(**batch)
        calls.append(0)
        if len(calls) == 2:
            return output.loss + (output.logits[0, 0] * bad).sum() * 0
        return output.loss

    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.down_proj: the grad.* batch 1 "):
        statistics_of(peft_of(c, device), loader(c.samples), forward_fn, loss_reduction="mean")
