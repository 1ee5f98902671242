"""The loss from the last hidden states is the model's own, or else the model's own is taken."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import smollm2
from filet.loss.chunked import ChunkedLoss, StandIn
from models import (
    VOCAB,
    Case,
    assert_energies,
    case,
    collate,
    energies_of,
    linears,
    llama,
    loader,
    peft_of,
    randomised,
    true_energies,
    truth,
)
from passes import FLOAT32, models_own, snapshot, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Chunks of eight rows; the scale of every backward that went through them."""
    monkeypatch.setattr("filet.loss.chunked.CHUNK_BYTES", 9 * VOCAB * 4)
    monkeypatch.setattr("filet.loss.chunked.CHUNK_ROWS", 8)
    scales: list[float] = []
    plain = ChunkedLoss.backward

    def backward(self: ChunkedLoss, scale: float, *args: Any, **kwargs: Any) -> None:
        scales.append(scale)
        plain(self, scale, *args, **kwargs)

    monkeypatch.setattr(ChunkedLoss, "backward", backward)
    yield scales


def small(kind: str) -> Case:
    """Causal language models with a head that is not plain, or not quite."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    if kind in ("llama", "gpt2", "opt"):
        return case(kind)
    if kind == "tied":
        model = llama(layers=1, tie_word_embeddings=True)
    elif kind == "bias":
        model = PhiForCausalLM(PhiConfig(**settings))
    elif kind == "capped":
        model = Gemma2ForCausalLM(
            Gemma2Config(**settings, head_dim=12, final_logit_softcapping=3.0)
        )
    elif kind == "divided":
        model = GraniteForCausalLM(GraniteConfig(**settings, logits_scaling=4.0))
    elif kind == "multiplied":
        model = CohereForCausalLM(CohereConfig(**settings, logit_scale=0.25))
    elif kind == "auxiliary":
        model = MixtralForCausalLM(
            MixtralConfig(**settings, num_local_experts=2, output_router_logits=True)
        )
    else:
        raise ValueError(kind)
    model = model if kind == "tied" else randomised(model)
    attention = [name for name in linears(model, "lm_head") if "experts" not in name]
    attention = [name for name in attention if "router" not in name and "gate" not in name]
    return Case(model, case("llama").samples, attention, True)


# Where it applies.


@pytest.mark.parametrize(("side", "task"), [("left", None), ("right", "CAUSAL_LM")])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "tied", "bias"])
def test_energies(
    kind: str, side: str, task: str | None, device: torch.device, chunks: list[float]
) -> None:
    """Padding, prompts without labels; against Algorithm 1, and against the model's own loss.

    With a task PEFT may call the model by another way, or its forward alone, by its version.
    """
    c = small(kind)
    made = functools.partial(peft_of, c, device, task_type=task)
    found = energies_of(made(), loader(c.samples, side=side))
    assert chunks == [1.0] * 3
    assert_energies(found, true_energies(c.model, c.targets, c.samples, True), FLOAT32)
    theirs = energies_of(made(), loader(c.samples, side=side), models_own)
    assert len(chunks) == 3
    assert_energies(found, theirs, 1e-5)
    counts = [
        statistics_of(made(), loader(c.samples, side=side), forward_fn).loss_terms
        for forward_fn in (None, models_own)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, device: torch.device, chunks: list[float]) -> None:
    """The gradient of the logits is rounded to the model's dtype, as the model's own is."""
    c = case("llama")
    found, theirs = (
        energies_of(peft_of(c, device, dtype), loader(c.samples), forward_fn)
        for forward_fn in (None, models_own)
    )
    assert len(chunks) > 3 if dtype == torch.float16 else chunks == [1.0] * 3
    # The products see other shapes, and so round other last bits: 2⁻⁸ and 2⁻¹¹.
    assert_energies(found, theirs, 2e-2 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_forward_alone(
    head: torch.dtype, device: torch.device, chunks: list[float]
) -> None:
    """As accelerate has it. The head multiplies in what autocast gives it, whatever its own is."""
    c, found = case("llama"), []
    for forward_fn in (None, models_own):
        peft_model = peft_of(c, device)
        peft_model.base_model.model.lm_head.to(head)
        autocast = torch.autocast(device.type, torch.bfloat16)
        vars(peft_model)["forward"] = autocast(peft_model.forward)
        found.append(energies_of(peft_model, loader(c.samples), forward_fn))
    assert len(chunks) == 3
    # Of products of other shapes as above. On a CPU they are the same; logits in float32 would be
    # off by 0.008.
    assert_energies(*found, 1e-3 if device.type == "cpu" else 2e-2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, device: torch.device, chunks: list[float]) -> None:
    c = case("llama")
    peft_model = peft_of(c, device)
    peft_model.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert_energies(energies_of(peft_model, loader(c.samples)), truth("llama"), FLOAT32)
    assert len(chunks) == 3


class Plain(nn.Module):
    """The least that counts as a causal language model; quickly traced."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 10)
        self.inner = nn.Linear(10, 12)
        self.lm_head = nn.Linear(12, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.lm_head(torch.tanh(self.inner(self.embedding(input_ids))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def test_compiled_model(device: torch.device, chunks: list[float]) -> None:
    """Traced before the pass, with its own head; then with the one that stands there."""
    c = Case(randomised(Plain()), case("llama").samples, ["inner"], True)
    counter = CompileCounter()
    model = torch.compile(copy.deepcopy(c.model).to(device), backend=counter, dynamic=True)
    batch = {key: value.to(device) for key, value in collate(c.samples[:4]).items()}
    assert model(**batch).loss.isfinite()
    traced = counter.frame_count
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["inner"]))
    found = energies_of(peft_model, loader(c.samples))
    assert len(chunks) == 3 and counter.frame_count > traced > 0
    expected = true_energies(c.model, c.targets, c.samples, True)
    assert_energies({"inner": found["_orig_mod.inner"]}, expected, FLOAT32)


def test_hooks_of_a_device_map(chunks: list[float]) -> None:
    c = small("tied")
    model = dispatch_model(copy.deepcopy(c.model), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    found = energies_of(peft_of(Case(model, c.samples, c.targets)), loader(c.samples))
    assert len(chunks) == 3
    assert_energies(found, true_energies(c.model, c.targets, c.samples, True), FLOAT32)


def test_head_on_another_device(chunks: list[float]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device beside the CPU")
    c = case("llama")
    model = copy.deepcopy(c.model).to("cuda")
    model.lm_head.to("cpu")
    # As a device map does it: the input moves to the weight.
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=c.targets))
    assert_energies(energies_of(peft_model, loader(c.samples)), truth("llama"), FLOAT32)
    assert len(chunks) == 3


def test_sampled_labels(device: torch.device, chunks: list[float]) -> None:
    """The same draws as from the logits of whole batches."""
    c = case("llama")
    found, theirs = (
        energies_of(peft_of(c, device), loader(c.samples), forward_fn, fisher="sampled")
        for forward_fn in (None, models_own)
    )
    assert len(chunks) == 3
    assert_energies(found, theirs, 1e-5)


class Logits(TorchDispatchMode):
    """By operation, the rows of every tensor whose rows are as long as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.width:
                self.rows.setdefault(str(func), []).append(tensor.numel() // self.width)
        return result


def test_only_chunks_of_labelled_rows_have_logits(chunks: list[float]) -> None:
    c = small("bias")
    with Logits(VOCAB) as seen:
        statistics = statistics_of(peft_of(c), loader(c.samples))
    largest = max(max(rows) for name, rows in seen.rows.items() if "t.default" not in name)
    assert largest == 8, seen.rows  # a chunk, or the few tokens of the first batch
    (made,) = (rows for name, rows in seen.rows.items() if "addmm" in name)
    assert sum(made) == statistics.loss_terms + 8
    with Logits(VOCAB) as seen:
        statistics_of(peft_of(c), loader(c.samples), models_own)
    assert max(max(rows) for rows in seen.rows.values()) > 8


def test_smollm2(chunks: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model with tied embeddings: the moments are those of its own loss.

    They differ by up to 1.3e-5, since the products of 30 layers round other last bits.
    """
    monkeypatch.setattr("filet.loss.chunked.CHUNK_BYTES", 2**22)
    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(smollm2.prepare(), dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 29])
    peft_model = get_peft_model(base, lora)
    ids = torch.randint(3, 49000, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    labels = ids.where(mask == 1, -100)
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ours, theirs = (statistics_of(peft_model, [batch], f) for f in (None, models_own))
    assert len(chunks) == 1
    assert ours.loss_terms == theirs.loss_terms == int((labels[:, 1:] != -100).sum())
    for name, moments in ours.moments.items():
        for side in ("input", "output"):
            expected = getattr(theirs.moments[name], side).sum.double()
            scale = expected.diagonal().outer(expected.diagonal()).sqrt()
            error = ((getattr(moments, side).sum - expected).tril().abs() / scale).max()
            assert error <= 5e-5, f"{name}, {side}: {error:.3g}"


# Where it does not.


def own_loss_of(
    caplog: pytest.LogCaptureFixture, peft_model: Any, batches: Any, *args: Any, **config: Any
) -> tuple[dict[str, Tensor], str]:
    """The energies, and why the model's own loss was taken."""
    with caplog.at_level(logging.INFO, "filet"):
        found = energies_of(peft_model, batches, *args, **config)
    return found, "; ".join(r.getMessage() for r in caplog.records if r.name == "filet")


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["capped", "divided", "multiplied"])
def test_logits_that_are_not_the_heads(
    kind: str, fisher: str, device: torch.device, caplog: Any, chunks: list[float]
) -> None:
    """Found out in the first batch, which is not counted twice for that."""
    c = small(kind)
    peft_model = peft_of(c, device)
    found, why = own_loss_of(caplog, peft_model, loader(c.samples), fisher=fisher)
    assert not chunks
    assert why == "the model computes its own loss: its logits are not what its head gives"
    assert_energies(
        found, energies_of(peft_model, loader(c.samples), models_own, fisher=fisher), 1e-6
    )
    if fisher == "empirical":
        assert_energies(found, true_energies(c.model, c.targets, c.samples, True), FLOAT32)
    statistics = statistics_of(peft_of(c, device), loader(c.samples))
    for moments in statistics.moments.values():
        assert int(moments.input.count) == int(moments.output.count) == statistics.tokens


@pytest.mark.parametrize("given", ["auto", "sum"])
def test_loss_that_is_not_plain(given: Any, caplog: Any, chunks: list[float]) -> None:
    """A router's auxiliary loss; a mean that is said to be a sum."""
    c = small("auxiliary" if given == "auto" else "tied")
    peft_model = peft_of(c)
    found, why = own_loss_of(caplog, peft_model, loader(c.samples), loss_reduction=given)
    assert not chunks and "its loss of 7 tokens" in why
    theirs = energies_of(peft_model, loader(c.samples), models_own, loss_reduction=given)
    assert_energies(found, theirs, 1e-6)


@pytest.mark.parametrize("what", ["adapter", "hook", "forward_fn", "key", "short", "class", "copy"])
def test_other_reasons(what: str, caplog: Any, chunks: list[float]) -> None:
    c = small("tied" if what == "copy" else "llama")
    samples, batches, forward_fn, message = c.samples, loader(c.samples), None, ""
    peft_model = peft_of(c)
    if what == "adapter":
        peft_model = peft_of(Case(c.model, samples, [*c.targets, "lm_head"]))
        message = "its head is a Linear; expected nn.Linear"
    elif what == "hook":
        head = peft_model.base_model.model.lm_head
        head.register_forward_hook(lambda module, args, output: output * 0.5)
        message = "its head has hooks"
    elif what == "forward_fn":
        forward_fn, message = models_own, "forward_fn was given"
    elif what == "key":
        batches = [b | {"logits_to_keep": 0} for b in batches]
        message = "the batch has logits_to_keep"
    elif what == "short":
        batches = [{k: v[:, :2] for k, v in batch.items()} for batch in loader(samples)]
        message = "the batch has too few tokens"
    elif what == "class":
        c = case("bert masked")
        peft_model, batches = peft_of(c), loader(c.samples)
        message = "it is not one of transformers' causal language models"
    elif what == "copy":
        base = peft_model.base_model.model
        base.model.another = base.lm_head
        message = "its head is at 2 places"
    found, why = own_loss_of(caplog, peft_model, batches, forward_fn)
    assert not chunks and why.count(message) == 1, why
    assert_energies(found, energies_of(peft_model, batches, models_own), 1e-6)


# Errors.


def test_label_outside_the_vocabulary(chunks: list[float]) -> None:
    c = case("llama")
    for wrong in (VOCAB, -1):
        batch = collate(c.samples[:4])
        batch["labels"][1, 2] = wrong
        message = rf"labels of batch 0 has {wrong}; expected -100, or .* 0 … 28"
        with pytest.raises(ValueError, match=message):
            statistics_of(peft_of(c), [batch])


def test_the_head_is_back_after_an_exception() -> None:
    c = case("llama")
    peft_model = peft_of(c)
    head = peft_model.base_model.model.lm_head
    before = snapshot(peft_model)
    calls: list[type] = []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(type(peft_model.base_model.model.lm_head))
        if len(calls) == 2:
            raise ZeroDivisionError

    handle = peft_model.base_model.model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        statistics_of(peft_model, loader(c.samples))
    handle.remove()
    assert [kind.__name__ for kind in calls] == ["StandIn"] * 2
    assert peft_model.base_model.model.lm_head is head
    after = snapshot(peft_model)
    assert after["weights"].keys() == before["weights"].keys()
    assert after["hooks"] == before["hooks"] and after["attributes"] == before["attributes"]


def test_a_batch_without_finite_logits_settles_nothing(chunks: list[float], caplog: Any) -> None:
    """The first batch's NaN is named as ever, where it began."""
    c = case("llama")
    peft_model = peft_of(c)
    with torch.no_grad():
        peft_model.base_model.model.model.norm.weight[0] = torch.nan
    with (
        caplog.at_level(logging.INFO, "filet"),
        pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.down_proj: the gradient .*NaN"),
    ):
        statistics_of(peft_model, loader(c.samples))
    assert not chunks and "the logits of a batch are not finite" in caplog.text


def test_gradient() -> None:
    """Of the summed loss with respect to the hidden states, against autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    head = randomised(nn.Linear(6, 11)).double()
    hidden = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    predicts = torch.rand(4, 5, generator=generator) < 0.6
    labels = torch.randint(0, 11, (int(predicts.sum()),), generator=generator)
    loss = F.cross_entropy(head(hidden)[predicts], labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, hidden)
    chunked = ChunkedLoss(StandIn(head), hidden * 1, predicts, labels, None)
    assert chunked.terms == labels.numel() < 20 and chunked.requires_grad
    for _ in range(2):
        chunked.backward(3.0, retain_graph=True)
    # float64; the sums are added in another order.
    torch.testing.assert_close(hidden.grad, 6 * expected, rtol=1e-12, atol=1e-14)
