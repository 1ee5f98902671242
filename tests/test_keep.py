"""Data to keep: its input moments, what they choose, text of the model, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from filet import (
    FiletConfig,
    FiletReport,
    Statistics,
    apply_statistics,
    initialize_folder,
    initialize_lora_filet_weights,
)
from filet.collect import unrounded
from filet.collect.statistics import collect_statistics
from filet.loss.text import SELF_TOKENS
from filet_kernels import SecondMoment, contrast
from initialised import assert_bitwise, halves_of, initialized, layer_of, never, weights
from models import Case, case, llama, loader, observe, peft_of, randomised, weight_of
from passes import assert_unchanged, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(c: Case) -> list[dict[str, Tensor]]:
    """Other samples of the same kind: the case's with their tokens moved on by one."""
    samples = []
    for sample in c.samples[:5]:
        ids = sample["input_ids"]
        samples.append({**sample, "input_ids": torch.where(ids > 0, ids % 11 + 1, ids)})
    return samples


def batches_of(c: Case, labels: bool = False, size: int = 2) -> list[dict[str, Tensor]]:
    """Padded batches of the data to keep, without labels or with such as no model has."""
    batches = list(loader(kept(c), size))
    for batch in batches:
        del batch["labels"]
        if labels:
            batch["labels"] = torch.full((3, 1), 10**6)
    return batches


def collected(c: Case, keep: Any, device: Any = "cpu", **config: Any) -> Statistics:
    return collect_statistics(
        peft_of(c, device),
        loader(c.samples),
        FiletConfig(**{"samples": None, **config}),
        forward_fn=c.forward_fn,
        show_progress_bar=False,
        keep=keep,
    )


def whole(moment: SecondMoment) -> Tensor:
    lower = moment.sum.cpu().double().tril()
    return lower + lower.tril(-1).T


def assert_close(one: SecondMoment, two: SecondMoment) -> None:
    """Equal but for the rounding of float32 sums."""
    assert int(one.count) == int(two.count)
    assert float((whole(one) - whole(two)).norm() / whole(two).norm()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "experts"])
def test_moments_are_sums_over_hooks(kind: str, device: torch.device) -> None:
    c = case(kind)
    # Of encoder-decoders the labels are the decoder's input.
    keep = batches_of(c, size=1) if kind in ("llama", "gpt2") else loader(kept(c), 1)
    statistics = collected(c, keep, device)
    assert statistics.keep is not None and list(statistics.keep) == list(statistics.moments)
    assert statistics.keep_samples == 5
    seen, _ = observe(c.model, c.targets, kept(c), c.shift)
    for name, moment in statistics.keep.items():
        mine = statistics.moments[name].input
        assert moment.space == mine.space and moment.sum.device == mine.sum.device
        if name not in seen or not int(mine.count):
            assert not int(moment.count) and not moment.sum.any(), name
            continue
        v = seen[name][0]
        v = v if moment.space == "x" else v @ weight_of(c.model, name).double().T
        assert int(moment.count) == len(v), name
        truth = v.T @ v
        assert float((whole(moment) - truth).norm() / truth.norm()) < 1e-5, name


def test_an_encoder_decoder_without_input_for_its_decoder() -> None:
    c = case("t5")
    keep = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches_of(c, True)]
    with pytest.raises(ValueError, match=r"^data to keep: the decoder has no input \(.* labels"):
        collected(c, keep)


def test_padding_does_not_count_and_labels_do_not_matter() -> None:
    c = case("llama")
    one, two = (collected(c, batches_of(c, labels)) for labels in (False, True))
    alone = collected(c, batches_of(c, size=1))
    assert one.keep is not None and two.keep is not None and alone.keep is not None
    tokens = sum(int(sample["attention_mask"].sum()) for sample in kept(c))
    assert one.keep_tokens == two.keep_tokens == alone.keep_tokens == tokens
    for name in one.keep:
        assert torch.equal(whole(one.keep[name]), whole(two.keep[name])), name
        assert_close(one.keep[name], alone.keep[name])


@pytest.mark.parametrize("share", [True, False])
def test_it_is_shared_as_the_task_is(share: bool) -> None:
    statistics = collected(case("llama"), batches_of(case("llama")), share_inputs=share)
    assert statistics.keep is not None and bool(statistics.shared_input) == share
    for one in statistics.keep:
        for two in statistics.keep:
            tasks = statistics.moments[one].input is statistics.moments[two].input
            assert (statistics.keep[one] is statistics.keep[two]) == tasks, (one, two)


def test_the_task_and_several_passes_are_as_without() -> None:
    c = case("llama")
    plain = collected(c, None)
    once = collected(c, batches_of(c))
    twice = collected(c, iter(batches_of(c)), passes=2)
    assert plain.keep is None and once.keep is not None and twice.keep is not None
    for name, moments in plain.moments.items():
        for other in (once, twice):
            assert torch.equal(whole(moments.input), whole(other.moments[name].input)), name
            assert torch.equal(whole(moments.output), whole(other.moments[name].output)), name
        assert torch.equal(whole(once.keep[name]), whole(twice.keep[name])), name
    for follower, leader in twice.shared_input.items():
        assert twice.keep[follower] is twice.keep[leader]


def test_outputs_that_are_handed_on_and_grow(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As a GPU has y: float16 by a scale that the first batch, of faint inputs, set too large."""
    c = case("llama")
    keep = [*batches_of(c, size=1)[:1], *batches_of(c, size=4)]
    found = []
    for on in (set(), {"cpu", "cuda"}):
        monkeypatch.setattr(unrounded, "HANDS_ON", on)
        peft_model = peft_of(c, device, torch.bfloat16)
        for name in c.targets:
            layer_of(peft_model, name).get_base_layer().register_forward_pre_hook(
                lambda module, args: (args[0] * (2.0**-30 if args[0].shape[0] == 1 else 1),)
            )
        statistics = collect_statistics(
            peft_model, loader(c.samples), FiletConfig(), show_progress_bar=False, keep=keep
        )
        assert statistics.keep is not None
        found.append(statistics.keep)
    assert {moment.space for moment in found[0].values()} == {"x", "y"}
    for name, moment in found[0].items():
        # The model's bfloat16 may round otherwise where y comes from another product.
        off = (whole(found[1][name]) - whole(moment)).norm() / whole(moment).norm()
        assert float(off) < (2e-2 if device.type == "cuda" else 5e-3), name
        assert int(moment.count) == int(found[1][name].count)


def test_it_is_read_no_further_than_samples_and_no_gradient_is_made() -> None:
    c = case("llama")
    grads: list[bool] = []

    def endless() -> Iterator[Any]:
        yield from batches_of(c, size=1)
        raise AssertionError("read too far")

    peft_model = peft_of(c)
    layer_of(peft_model, c.targets[0]).get_base_layer().register_forward_hook(
        lambda module, args, output: grads.append(output.requires_grad)
    )
    before = snapshot(peft_model)
    settings = FiletConfig(samples=3)
    statistics = collect_statistics(
        peft_model, loader(c.samples, 1), settings, show_progress_bar=False, keep=endless()
    )
    assert statistics.keep_samples == 3
    assert grads == 3 * [True] + 3 * [False]
    assert_unchanged(peft_model, before)


def test_directions_are_the_generalised_eigenvectors(device: torch.device) -> None:
    """Against LAPACK's, of activations that hooks captured in float64."""
    c = case("llama")
    peft_model = peft_of(c, device)
    report = initialized(peft_model, keep=batches_of(c), damping=0.1, start="untouched")
    task, keep = (observe(c.model, c.targets, s, c.shift)[0] for s in (c.samples, kept(c)))
    assert report.config["select"] == "contrast"
    for name, module in report.modules.items():
        W, (x, _), (x0, _) = weight_of(c.model, name).double(), task[name], keep[name]
        assert module.kind == "contrast" and module.indices.tolist() == list(range(module.rank))
        basis = torch.eye(W.shape[1], dtype=torch.float64)
        if module.input_space == "y":
            basis = torch.linalg.qr(W.T)[0]
        S, S0 = ((v @ basis).T @ (v @ basis) for v in (x, x0))
        S, S0 = S / S.diagonal().mean(), S0 / S0.diagonal().mean()
        S0 += 0.1 * torch.eye(len(S0), dtype=torch.float64)
        values, vectors = scipy.linalg.eigh(S.numpy(), S0.numpy())
        values = torch.from_numpy(values[::-1].copy())[: module.rank]
        rows = (basis @ torch.from_numpy(vectors[:, ::-1].copy())).T[: module.rank]
        rows /= rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(module.energies, values, rtol=1e-4, atol=0)
        A, B, A0, B0 = halves_of(layer_of(peft_model, name))
        assert torch.equal(A, A0) and torch.equal(B, B0)
        # c = γ for all; vectors up to a sign, of eigenvalues that are apart.
        root = FiletConfig.gamma**0.5
        assert float(((A * rows).sum(1).abs() / root - 1).abs().max()) < 1e-3, name
        torch.testing.assert_close(A.norm(dim=1), torch.full((len(A),), root).double())
        expected = W @ A.T
        expected *= root / expected.norm(dim=0)
        torch.testing.assert_close(B, expected, rtol=0, atol=1e-5)
    table = report.table()
    assert "eigenvalues of task against data to keep" in table and "contrast" in table


def test_modules_that_the_data_to_keep_never_reach_are_named() -> None:
    """Their directions keep nothing: they are the task's own."""
    c = case("experts")
    first = [{"input_ids": torch.tensor([[3, 6, 9, 12]]), "labels": torch.zeros(1, 4).long()}]
    with pytest.warns(UserWarning, match="no token of the data to keep reached 4 modules") as found:
        report = initialized(peft_of(c), loader(c.samples), forward_fn=c.forward_fn, keep=first)
    text = next(str(each.message) for each in found if "to keep reached" in str(each.message))
    assert "experts.1.0" in text and "experts.0" not in text
    assert {name: its.keep_tokens for name, its in report.modules.items()} == {
        f"experts.{expert}.{layer}": 4 * (expert == 0) for expert in range(3) for layer in (0, 2)
    }


def test_directions_that_the_task_lacks_are_named() -> None:
    """Of the rank in a module, those whose λ is rounding."""
    c = case("llama")
    ids = torch.tensor([[5, 9, 11]])
    few = [{"input_ids": ids, "labels": ids}]
    peft_model = peft_of(c)
    with pytest.warns(UserWarning, match=r"fewer directions than the rank in \d+ modules.*1 of 4"):
        report = initialize_lora_filet_weights(
            peft_model, few, FiletConfig(samples=None), show_progress_bar=False, keep=batches_of(c)
        )
    shortest = min(report.modules.values(), key=lambda its: float(its.energies[-1]))
    assert float(shortest.energies[-1]) < 1e-5 * float(shortest.energies[0])


def test_a_gamma_that_no_dtype_holds_is_named() -> None:
    c = case("llama")
    with pytest.warns(UserWarning, match="will not train; expected a larger gamma, a float32"):
        initialized(peft_of(c), keep=batches_of(c), gamma=1e-90)


def test_modules_that_share_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[int, ...]] = []
    plain = contrast.contrast_directions

    def counted(W: Tensor, *args: Any, **kwargs: Any) -> Any:
        solved.append(tuple(W.shape))
        return plain(W, *args, **kwargs)

    monkeypatch.setattr("filet.select.contrast_directions", counted)
    c = case("llama")
    report = initialized(peft_of(c), keep=batches_of(c))
    # q, k and v; o; gate and up; down: of two blocks.
    assert len(report.modules) == 14 and len(solved) == 8


def test_saved_loaded_and_applied(tmp_path: Path) -> None:
    c = case("llama")
    taken = collected(c, batches_of(c))
    taken.save(tmp_path / "one.safetensors")
    loaded = Statistics.load(tmp_path / "one.safetensors")
    assert taken.keep is not None and loaded.keep is not None
    assert (loaded.keep_samples, loaded.keep_tokens) == (taken.keep_samples, taken.keep_tokens)
    for name, moment in taken.keep.items():
        assert loaded.keep[name].space == moment.space
        assert int(loaded.keep[name].count) == int(moment.count)
        assert torch.equal(whole(loaded.keep[name]), whole(moment))
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert sum(key.startswith("keep:") and ".sum" in key for key in file.keys()) == 8
    adapters = []
    for statistics in (taken, loaded):
        adapters.append(peft_of(c))
        report = apply_statistics(adapters[-1], statistics)
        assert report.config["select"] == "contrast"
    assert_bitwise(adapters[0], weights(adapters[1]))
    direct = peft_of(c)
    initialized(direct, keep=batches_of(c))
    assert_bitwise(direct, weights(adapters[0]))
    # Energies are there as well, for who asks for them.
    lowest, plain = peft_of(c), peft_of(c)
    assert apply_statistics(lowest, loaded, FiletConfig(select="min")).config["select"] == "min"
    initialized(plain)
    assert_bitwise(lowest, weights(plain))


def test_a_file_from_before_is_read(tmp_path: Path) -> None:
    c = case("llama")
    path = tmp_path / "old.safetensors"
    collected(c, None).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["statistics"])
    assert header.pop("keep_samples") == header.pop("keep_tokens") == 0
    save_file(load_file(path), path, {**metadata, "statistics": json.dumps(header)})
    loaded = Statistics.load(path)
    assert loaded.keep is None and loaded.keep_samples == 0
    assert apply_statistics(peft_of(c), loaded).config["select"] == "min"


def test_merged(tmp_path: Path) -> None:
    c = case("llama")
    keep = batches_of(c, size=1)
    whole_run = collected(c, keep)
    parts = [
        collect_statistics(
            peft_of(c), loader(samples), FiletConfig(samples=None), show_progress_bar=False, keep=of
        )
        for samples, of in ((c.samples[:4], keep[:2]), (c.samples[4:], keep[2:]))
    ]
    merged = parts[0].merge(parts[1])
    assert merged.keep is not None and whole_run.keep is not None
    assert merged.keep_samples == 5 and merged.keep_tokens == whole_run.keep_tokens
    for name, moment in merged.keep.items():
        assert_close(moment, whole_run.keep[name])
    for follower, leader in merged.shared_input.items():
        assert merged.keep[follower] is merged.keep[leader]
    without = collected(c, None)
    for one, two in ((without, parts[0]), (parts[0], without)):
        half = one.merge(two)
        assert half.keep is not None and half.keep_samples == 2
        for name in half.keep:
            assert torch.equal(whole(half.keep[name]), whole(parts[0].keep[name]))
    assert without.merge(without).keep is None


def test_merged_where_only_the_other_saw_a_module() -> None:
    """It took its space without knowing whose input it shares, and has nothing to keep in it."""
    c = case("llama")
    one, two = collected(c, batches_of(c)), collected(c, None)
    assert one.keep is not None
    name = next(name for name, its in one.moments.items() if its.input.space == "x")
    its = one.moments[name]
    unseen = SecondMoment.zeros("y", its.shape[0], dtype=its.input.sum.dtype, device="cpu")
    one.moments[name] = dataclasses.replace(its, input=unseen)
    one.keep[name] = unseen
    for first, second in ((one, two), (two, one)):
        keep = first.merge(second).keep
        assert keep is not None and int(keep[name].count) == 0
        assert keep[name].space == two.moments[name].input.space


def test_statistics_with_other_moments_to_keep_are_refused() -> None:
    statistics = collected(case("llama"), batches_of(case("llama")))
    name = case("llama").targets[0]
    assert statistics.keep is not None
    with pytest.raises(ValueError, match="keep has moments of other modules"):
        dataclasses.replace(statistics, keep={})
    wrong = {**statistics.keep, name: SecondMoment.zeros("y", 32)}
    with pytest.raises(ValueError, match=rf"{name}: keep is in space 'y' of size 32"):
        dataclasses.replace(statistics, keep=wrong)


# Text of the model's own.


def generating(**config: Any) -> Case:
    model = llama(max_position_embeddings=300, bos_token_id=1, eos_token_id=2, **config)
    return dataclasses.replace(case("llama"), model=model)


def test_self_is_drawn_from_the_model_and_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    c = generating()
    texts: list[list[dict[str, Tensor]]] = []
    from filet.loss.text import sampled_text

    def noted(*args: Any) -> Any:
        texts.append(sampled_text(*args))
        return texts[-1]

    monkeypatch.setattr("filet.collect.keep.sampled_text", noted)
    runs: list[Statistics] = []
    given: list[int] = []
    for seed in (0, 0, 1):
        peft_model = peft_of(c)
        # The adapter has no part in it: the same text, whatever it adds.
        if len(runs) == 1:
            randomised(layer_of(peft_model, c.targets[0]).lora_B)
        before = snapshot(peft_model)
        settings = FiletConfig(samples=3, seed=seed)
        given.clear()
        watch = peft_model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: given.append(args[0].shape[1])
        )
        runs.append(
            collect_statistics(
                peft_model, loader(c.samples), settings, show_progress_bar=False, keep="self"
            )
        )
        watch.remove()
        assert_unchanged(peft_model, before)
        # One token after the other by the cache, and then all of them at once.
        assert given.count(1) == given.index(SELF_TOKENS) - given.index(1) == SELF_TOKENS - 1
    ids = [torch.cat([batch["input_ids"] for batch in text]) for text in texts]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    assert ids[0].shape == (3, SELF_TOKENS)
    assert (ids[0][:, 0] == 1).all() and not (ids[0][:, 1:] == 2).any()
    assert all(run.keep_samples == 3 and run.keep_tokens == 3 * SELF_TOKENS for run in runs)
    # By their distribution, as the model has it without a cache: the numbers that drew them.
    with torch.no_grad():
        logits = c.model.eval()(input_ids=ids[0]).logits[:, :-1].double()
    logits[..., 2] = -torch.inf
    cumulative = logits.softmax(-1).cumsum(-1)
    upper = cumulative.gather(2, ids[0][:, 1:, None]).squeeze(2)
    lower = upper - logits.softmax(-1).gather(2, ids[0][:, 1:, None]).squeeze(2)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(3, SELF_TOKENS - 1, generator=generator, dtype=torch.float64)
    assert ((lower - 1e-5 <= drawn) & (drawn <= upper + 1e-5)).all()


def test_self_where_checkpointing_forbids_a_cache() -> None:
    c = generating(num_attention_heads=2, num_key_value_heads=1)
    runs = []
    for checkpointing in (False, True):
        peft_model = peft_of(c)
        if checkpointing:
            peft_model.base_model.model.gradient_checkpointing_enable()
        settings = FiletConfig(samples=1)
        runs.append(
            collect_statistics(
                peft_model, loader(c.samples), settings, show_progress_bar=False, keep="self"
            )
        )
    assert runs[0].keep is not None and runs[1].keep is not None
    for name in runs[0].keep:
        assert_close(runs[0].keep[name], runs[1].keep[name])


@pytest.mark.parametrize("kind", ["vit", "t5", "perceptron"])
def test_self_of_other_models_is_refused(kind: str) -> None:
    c = case(kind)
    with pytest.raises(ValueError, match=r"keep='self': .* is no causal language model"):
        initialized(peft_of(c), never(), forward_fn=c.forward_fn, keep="self")


def test_self_without_a_first_token_is_refused() -> None:
    model = llama(bos_token_id=None, eos_token_id=None)
    c = dataclasses.replace(case("llama"), model=model)
    with pytest.raises(ValueError, match="keep='self': no bos_token_id or eos_token_id"):
        initialized(peft_of(c), never(), keep="self")


@pytest.mark.parametrize("token", [-1, 500])
def test_self_that_begins_with_no_word_is_refused(token: int) -> None:
    c = dataclasses.replace(case("llama"), model=llama(bos_token_id=token))
    with pytest.raises(ValueError, match=rf"bos_token_id={token} in the model's config.* none of"):
        initialized(peft_of(c), never(), keep="self")


def test_self_whose_texts_end_with_no_word() -> None:
    """They do not end, which is what is asked of them."""
    c = dataclasses.replace(case("llama"), model=llama(bos_token_id=1, eos_token_id=[500, -1]))
    report = initialized(peft_of(c), loader(c.samples), keep="self")
    assert report.keep["tokens"] > 0


# What is refused, before anything runs, or with all as it was.


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_data_to_keep_of_which_no_token_counts(engine: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    ids = torch.arange(4, 20).view(2, 8)
    task = [{"input_ids": ids, "labels": ids}]
    with pytest.raises(ValueError, match="no token of the data to keep counts"):
        initialize_folder(
            tmp_path / "base", task, tmp_path / "out", LoraConfig(r=2, target_modules=["q_proj"]),
            engine=engine, device="cpu", show_progress_bar=False,
            keep=[{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_tokens_of_embeddings_are_counted() -> None:
    c = case("llama")
    width = c.model.get_input_embeddings().weight.shape[1]
    statistics = collected(c, [{"inputs_embeds": torch.randn(2, 5, width)}])
    assert statistics.keep is not None and statistics.keep_tokens == 10
    assert {int(each.count) for each in statistics.keep.values()} == {10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "min"}, "keep= has no effect with select='min'"),
        ({"select": "random"}, "keep= has no effect with select='random'"),
        ({"scaling": "singular"}, "scaling='singular' has no effect with select='contrast'"),
        ({"keep": None, "select": "contrast"}, "select='contrast' without moments of data to keep"),
        ({"keep": None, "damping": 0.1}, "damping=0.1 has no effect with select='min'"),
        ({"keep": "selbst"}, "keep='selbst'; expected batches, or 'self'"),
    ],
)
def test_options_that_would_be_ignored(settings: dict[str, Any], message: str) -> None:
    peft_model = peft_of(case("llama"))
    before = weights(peft_model)
    with pytest.raises(ValueError, match=message):
        initialized(peft_model, never(), **{"keep": never(), **settings})
    assert_bitwise(peft_model, before)


@pytest.mark.parametrize("damping", [0, -1.0, float("inf"), float("nan"), "0.1"])
def test_a_damping_is_positive(damping: Any) -> None:
    with pytest.raises(ValueError, match=r"damping=.*; expected a positive number"):
        FiletConfig(damping=damping)


def test_what_is_no_batches_and_a_rank_too_high() -> None:
    c = case("llama")
    with pytest.raises(TypeError, match="keep is a dict; expected an iterable of batches"):
        initialized(peft_of(c), never(), keep=batches_of(c)[0])
    with pytest.raises(TypeError, match=r"^data to keep: the dataloader gave a int"):
        initialized(peft_of(c), keep=[3])
    nothing = [{"input_ids": torch.zeros(2, 0, dtype=torch.int64)}]
    with pytest.raises(ValueError, match=r"^data to keep: .* \(2, 0\): samples without a token"):
        initialized(peft_of(c), keep=nothing)
    with pytest.raises(ValueError, match=r"rank 17 exceeds the 16 that a product B A"):
        initialized(peft_of(c, r=17), never(), keep=never())


@pytest.mark.parametrize("what", ["none", "nan", "raises"])
def test_the_model_is_what_it_was_after_an_error(what: str) -> None:
    c = case("llama")
    peft_model = peft_of(c)

    def wrong() -> Iterator[Any]:
        batch = batches_of(c)[0]
        if what == "nan":
            embeds = peft_model.get_input_embeddings()(batch.pop("input_ids")).detach()
            yield {**batch, "inputs_embeds": embeds * torch.nan}
        if what == "raises":
            yield batch
            raise KeyboardInterrupt

    before = snapshot(peft_model)
    expected: Any = {
        "none": (ValueError, "the data to keep gave no sample"),
        "nan": (FloatingPointError, "^data to keep: .*NaN or infinity in batch 0"),
        "raises": (KeyboardInterrupt, None),
    }[what]
    with pytest.raises(expected[0], match=expected[1]):
        initialized(peft_model, keep=wrong())
    assert_unchanged(peft_model, before)


def test_report_and_picture(tmp_path: Path) -> None:
    c = case("llama")
    report = initialized(peft_of(c), keep=batches_of(c))
    report.save(tmp_path)
    again = FiletReport.load(tmp_path)
    assert again.table() == report.table()
    assert {module.kind for module in again.modules.values()} == {"contrast"}
    again.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_folders(tmp_path: Path) -> None:
    from peft import LoraConfig

    c = case("llama")
    c.model.save_pretrained(tmp_path / "model")
    given: Any = (tmp_path / "model", list(loader(c.samples)), tmp_path / "out")
    lora, settings = LoraConfig(r=4, target_modules="all-linear"), {"show_progress_bar": False}
    with pytest.raises(ValueError, match="select='contrast' without moments of data to keep"):
        initialize_folder(
            *given, lora, FiletConfig(select="contrast"), engine="blockwise", **settings
        )
    assert not (tmp_path / "out").exists()
    report = initialize_folder(*given, lora, engine="memory", keep=batches_of(c), **settings)
    assert report.config["select"] == "contrast"
