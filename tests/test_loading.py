"""An adapter's files replaced together or not at all, and read again to go on at rank r."""

from __future__ import annotations

import errno
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import filet
from adapted import (
    assert_same,
    base_state,
    initialise,
    initialised,
    llama,
    logits,
    train,
    trainable,
    trained,
    wrap,
)
from adapter_cases import CASES, FILES, Failing, assert_unchanged, base_of, contents, snapshot
from filet.adapter import saved
from filet.system import files

pytestmark = pytest.mark.usefixtures("one_thread")


def full_disk_at(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th file to be written meets a full disk, when half of it is there."""
    calls = itertools.count()

    def failing(write: Callable[..., Any], at: Callable[..., Path]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == k:
                at(*args).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return run

    for owner, name, at in (
        (peft.peft_model, "safe_save_file", lambda tensors, path, **_: Path(path)),
        (LoraConfig, "save_pretrained", lambda config, folder, **_: Path(folder) / FILES[0]),
        (Path, "write_text", lambda path, *_: path),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), at))


@pytest.mark.parametrize("k", range(3))
def test_full_disk_leaves_the_files_that_were_there(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialised()
    filet.save_as_lora(model, tmp_path / "old")
    before = contents(tmp_path / "old")
    assert sorted(before) == FILES
    train(model)
    for folder in ("old", "new"):
        with monkeypatch.context() as patch:
            full_disk_at(k, patch)
            with pytest.raises(OSError, match="No space left"):
                filet.save_as_lora(model, tmp_path / folder)
    assert contents(tmp_path / "old") == before
    assert contents(tmp_path / "new") == {}


def renames(patch: pytest.MonkeyPatch, k: int, error: BaseException, after: bool) -> Failing:
    failing = Failing(os.rename, k, error, after)
    patch.setattr(files.os, "rename", failing)
    return failing


# What comes of a signal between two lines.
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError("stale handle"), KeyboardInterrupt()])
@pytest.mark.parametrize("k", range(1, 7))
def test_files_are_replaced_together_or_not_at_all(
    k: int, error: BaseException, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialised()
    filet.save_as_lora(model, tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("The user's.")
    before = contents(tmp_path / "old")
    train(model)
    with monkeypatch.context() as patch:
        failing = renames(patch, k, error, after)
        with pytest.raises(type(error)):
            filet.save_as_lora(model, tmp_path / "old")
        assert failing.calls > k or k == 1  # which were brought back
    assert contents(tmp_path / "old") == before
    if k <= 3:
        with monkeypatch.context() as patch:
            renames(patch, k, error, after)
            with pytest.raises(type(error)):
                filet.save_as_lora(model, tmp_path / "new")
        assert contents(tmp_path / "new") == {}
    filet.save_as_lora(model, tmp_path / "old")
    assert contents(tmp_path / "old").keys() == before.keys()
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "old"))
    assert torch.equal(logits(plain), logits(model))


def test_killed_between_the_renames_nothing_loads_two_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its config no adapter is one: it goes first and comes last."""
    model = initialised()
    filet.save_as_lora(model, tmp_path)
    states: list[set[str]] = []
    rename = os.rename

    def watched(source: Any, goal: Any) -> None:
        states.append({path.name for path in tmp_path.iterdir() if path.name in FILES})
        rename(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", watched)
        filet.save_as_lora(model, tmp_path)
    assert [len(state) for state in states] == [3, 2, 1, 0, 1, 2]
    assert [FILES[0] in state for state in states] == [True] + 5 * [False]
    assert contents(tmp_path).keys() == set(FILES)


def test_another_process_saves_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all ranks of a DDP do that a script for FSDP2 has: it may take the old files first."""
    model = initialised()
    filet.save_as_lora(model, tmp_path)
    before, rename = contents(tmp_path), os.rename

    def late(source: Any, goal: Any) -> None:
        if Path(source).parent == tmp_path:
            Path(source).unlink()
        rename(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", late)
        filet.save_as_lora(model, tmp_path)
    assert contents(tmp_path) == before


RESUMED = ["plain", "rslora", "patterns rslora", "modules to save", "trained tokens", "bias all"]


RESUMED += ["rslora embedding", "rslora lora_bias", "classifier", "conv1d"]


@pytest.mark.parametrize("case", RESUMED)
def test_load_goes_on_at_rank_r(case: str, tmp_path: Path) -> None:
    model = wrap(base_of(case), **CASES[case])
    initialise(model)
    train(model)
    filet.save_as_lora(model, tmp_path)
    loaded = filet.load(base_of(case), tmp_path)
    assert_same(trainable(loaded), trainable(model))
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    train(model)
    train(loaded)
    assert_same(loaded.state_dict(), model.state_dict())
    filet.save_as_lora(loaded, tmp_path / "again")
    filet.save_as_lora(model, tmp_path / "same")
    for name in FILES[1:]:  # PEFT adds modules to save to its config of a classifier anew each time
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    plain = PeftModel.from_pretrained(base_of(case), str(tmp_path / "again"))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_a_head_in_half_precision_rounds_no_factor(tmp_path: Path, start: Any) -> None:
    model = wrap(llama().bfloat16(), modules_to_save=["lm_head"])
    initialise(model, start=start)
    factors = {key: x for key, x in model.state_dict().items() if ".lora_" in key}
    assert {x.dtype for x in factors.values()} == {torch.float32}
    filet.save_as_lora(model, tmp_path)
    found = filet.load(llama().bfloat16(), tmp_path).state_dict()
    for key, x in factors.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], x), key


def other_base() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] += 1e-4
    return model


def test_load_refuses_another_base_and_leaves_it_alone(tmp_path: Path) -> None:
    filet.save_as_lora(initialised(modules_to_save=["lm_head"]), tmp_path)
    model = other_base()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"another base model: the weight of model\.layers\.1\.self_attn\.q_proj"
    ):
        filet.load(model, tmp_path)
    assert_unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, where the model looks wrapped already
        wrap(model)


@pytest.mark.parametrize("error", [OSError("bad sector"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "place", ["get_peft_model", "set_peft_model_state_dict", "find_targets", "describe"]
)
def test_load_that_fails_late_leaves_the_base_alone(
    place: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was trained of its own: heads, biases, tokens."""

    def base() -> Any:
        return llama(attention_bias=True)

    more = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [3]}
    model = wrap(base(), **more)
    initialise(model)
    train(model)
    filet.save_as_lora(model, tmp_path)
    again = base()
    before = snapshot(again)
    with monkeypatch.context() as patch:
        patch.setattr(saved, place, Failing(getattr(saved, place), 1, error, after=True))
        with pytest.raises(type(error)):
            filet.load(again, tmp_path)
    assert_unchanged(again, before)
    assert torch.equal(logits(filet.load(again, tmp_path)), logits(model))


def test_load_refuses_what_is_no_adapter_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_config\.json; expected a folder"):
        filet.load(llama(), tmp_path)
    other = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(llama(), other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has a IA3Config; expected a LoRA adapter"):
        filet.load(llama(), tmp_path / "other")
    wrap(llama(), init_lora_weights="olora").save_pretrained(tmp_path / "olora")
    base = llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"init_lora_weights='olora', by which PEFT changes the"):
        filet.load(base, tmp_path / "olora")
    assert_unchanged(base, before)
    wrap(llama()).save_pretrained(tmp_path / "empty")
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has no tensor of LoRA"):
        filet.load(llama(), tmp_path / "empty")
    filet.save_as_lora(initialised(), tmp_path)
    description = json.loads((tmp_path / "filet.json").read_text())
    (tmp_path / "filet.json").write_text(json.dumps({**description, "format": "filet-adapter-1"}))
    with pytest.raises(ValueError, match=r"format 'filet-adapter-1'; expected 'filet-adapter-2'"):
        filet.load(llama(), tmp_path)


def test_load_refuses_a_description_of_another_adapter(tmp_path: Path) -> None:
    """A plain adapter saved over one of FILet's leaves filet.json there."""
    filet.save_as_lora(initialised(), tmp_path)
    wrap(llama()).save_pretrained(tmp_path)
    model = llama()
    before = snapshot(model)
    refused = pytest.raises(ValueError, match=r"describes another adapter than lies beside it: the")
    with refused:
        filet.load(model, tmp_path)
    wrap(llama(), target_modules=["up_proj"], r=8).save_pretrained(tmp_path)
    with refused:
        filet.load(model, tmp_path)
    wrap(llama(), r=8).save_pretrained(tmp_path)  # of the same shapes
    with refused:
        filet.load(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("by", ["filet", "peft", "gathered", "bin"])
def test_load_refuses_a_frozen_half_that_nothing_describes(tmp_path: Path, by: str) -> None:
    """As a plain LoRA of rank 2r it would train both halves, and nobody would see it."""
    model = initialised()
    if by == "filet":
        filet.save_as_lora(model, tmp_path)
    elif by == "gathered":
        state = {name: value for name, value in model.named_parameters() if "lora_" in name}
        model.save_pretrained(tmp_path, state_dict=state)
    else:
        model.save_pretrained(tmp_path, safe_serialization=by != "bin")
    expected = logits(filet.load(llama(), tmp_path))
    assert torch.equal(expected, logits(model))
    (tmp_path / "filet.json").unlink()
    base = llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"filet\.json.*from_pretrained loads the adapter as an"):
        filet.load(base, tmp_path)
    assert_unchanged(base, before)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True)
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(tmp_path / "plain")  # as what it is now, it is no longer FILet's
    assert torch.equal(logits(filet.load(llama(), tmp_path / "plain")), expected)


def test_load_refuses_an_adapter_that_plain_peft_trained_on(tmp_path: Path) -> None:
    """All of it, so that no half is the start any more."""
    filet.save_as_lora(trained(), tmp_path)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(filet.load(llama(), tmp_path)), logits(plain))
    train(plain)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes another .*PeftModel\.from_pretrained loads"):
        filet.load(llama(), tmp_path)


def test_load_refuses_a_base_that_lacks_a_module(tmp_path: Path) -> None:
    filet.save_as_lora(initialised(), tmp_path)
    with pytest.raises(ValueError, match=r"no linear module 'model\.layers\.1\..*', which"):
        filet.load(llama(num_hidden_layers=1), tmp_path)
    model = wrap(llama(attention_bias=True, mlp_bias=True), bias="all")
    initialise(model)
    train(model)
    filet.save_as_lora(model, tmp_path)
    small = llama(mlp_bias=True)  # which takes some of the biases, before one has no place
    state = base_state(wrap(llama(attention_bias=True, mlp_bias=True)))
    small.load_state_dict({key: state[key] for key in small.state_dict()})
    before = snapshot(small)
    with pytest.raises(ValueError, match=r"no place for '.*_proj.*bias', which"):
        filet.load(small, tmp_path)
    assert_unchanged(small, before)
