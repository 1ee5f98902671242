"""One process of several that differs, fails or dies: all of them end, with its message."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import filet
from filet import FiletConfig
from models import case, collate, llama, loader, peft_of
from ranks import errors, run, values

SAME = "expected the same on every rank"


def initialise(model: Any, rank: int, **more: Any) -> Any:
    batches = list(loader(case("llama").samples[rank::2], 3))
    more = {"config": FiletConfig(samples=None), "show_progress_bar": False, **more}
    return filet.initialize_lora_filet_weights(model, batches, **more)


def outcome_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def differing(rank: int, folder: Path) -> list[str]:
    """What is said of each difference between the ranks; the group lives on after it."""
    c = case("llama")

    def with_other(part: str) -> Any:
        model = peft_of(c)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part in name and rank:
                    parameter[0] += 1
        return model

    targets, batches = c.targets[: len(c.targets) - rank], list(loader(c.samples, 3))
    said = [
        outcome_of(lambda: initialise(peft_of(c), rank, config=FiletConfig(seed=rank))),
        outcome_of(lambda: initialise(with_other("layers.1.mlp.up_proj.base"), rank)),
        outcome_of(lambda: initialise(with_other("model.norm.weight"), rank)),
        outcome_of(lambda: initialise(peft_of(c, target_modules=targets), rank)),
        outcome_of(lambda: initialise(peft_of(c, r=3 + rank), rank)),
        outcome_of(lambda: initialise(peft_of(c), rank, keep="self" if rank else batches)),
    ]
    initialise(peft_of(c), rank)
    return said


def test_what_differs_is_named_on_all_ranks(tmp_path: Path) -> None:
    first, second = values(run(2, differing, tmp_path))
    assert first == second
    last = case("llama").targets[-1]
    for said, parts in zip(
        first,
        [
            ("FiletConfig.seed is 1 on rank 1 and 0 on rank 0",),
            ("the weight of model.layers.1.mlp.up_proj (dtype:shape:hash) is", "on rank 1 and"),
            ("model.norm.weight (dtype:shape:hash) is 'float32:32x1:",),
            (f"the module {last}", "is there on rank 0 and not on rank 1"),
            ("the module model.layers.0.self_attn.q_proj (rank,", "is (4,", "and (3,"),
            ("keep is 'self' on rank 1 and 'batches' on rank 0",),
        ],
        strict=True,
    ):
        assert said.startswith("ValueError: ")
        assert all(part in said for part in parts), said


def differing_otherwise(rank: int, folder: Path) -> list[str]:
    """Likewise: adapters, statistics, data to keep block by block, and what a trainer checks."""
    c = case("llama")
    two, trained = peft_of(c), peft_of(c)
    two.add_adapter("b", copy.deepcopy(two.peft_config["default"]))
    batches = list(loader(c.samples[rank::2], 3))
    config = FiletConfig(samples=None)
    taken = filet.collect_statistics(peft_of(c), batches, config, show_progress_bar=False)
    arguments = TrainingArguments(str(folder / "out"), report_to="none", use_cpu=True)
    trainer = Trainer(trained, arguments, train_dataset=c.samples, data_collator=collate)  # type: ignore[arg-type]

    def by_folder(**its: Any) -> str:
        settings: dict[str, Any] = {
            "output": folder / "adapter",
            "lora_config": LoraConfig(r=4, target_modules=["q_proj"]),
            "config": config,
            "engine": "blockwise",
            "device": "cpu",
            "show_progress_bar": False,
        }
        called = settings | its
        return outcome_of(lambda: filet.initialize_folder(folder / "model", batches, **called))

    said = [
        outcome_of(lambda: initialise(two, rank, adapter_name="b" if rank else "default")),
        outcome_of(lambda: filet.apply_statistics(peft_of(c), replace(taken, data=rank))),
        outcome_of(
            lambda: filet.apply_statistics(
                peft_of(c), replace(taken, shared_input={} if rank else taken.shared_input)
            )
        ),
        by_folder(keep=batches if rank else None),
        by_folder(engine="memory" if rank else "blockwise"),
        by_folder(output=folder / f"adapter{rank}"),
        by_folder(save_statistics=folder / "statistics.safetensors" if rank else None),
        outcome_of(lambda: filet.initialize_from_trainer(trainer, {} if rank else None)),  # type: ignore[arg-type]
    ]
    filet.apply_statistics(peft_of(c), taken)
    return said


def test_what_else_differs_is_named_on_all_ranks(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    first, second = values(run(2, differing_otherwise, tmp_path))
    adapters, data, shared, keep, engine, output, statistics, trainer = first
    assert adapters == "ValueError: adapter_name is 'b' on rank 1 and 'default' on rank 0; " + SAME
    assert data.startswith("ValueError: the hash of the statistics' samples is 1 on rank 1 and 0")
    assert shared.startswith("ValueError: whose input model.layers.0.self_attn.k_proj shares, and")
    assert keep == "ValueError: keep is 'batches' on rank 1 and None on rank 0; " + SAME
    assert engine == "ValueError: engine is 'memory' on rank 1 and 'blockwise' on rank 0; " + SAME
    assert output.startswith("ValueError: output is '") and output.endswith(
        "adapter0' on rank 0; " + SAME
    )
    assert (
        statistics.startswith("ValueError: save_statistics is '") and "None on rank 0" in statistics
    )
    assert first[:7] == second[:7]
    assert trainer.startswith("TypeError: rank 1: config is {}") and "config is {}" in second[-1]


def failing(rank: int, folder: Path) -> list[tuple[str, bool]]:
    """What is raised where the second rank alone fails, and whether its model is as it was."""
    c = case("llama")

    def with_nan(model: Any, batch: Any) -> Any:
        output = model(**batch)
        return output.loss * (torch.nan if rank else 1)

    def raises(error: Exception) -> Callable[..., Any]:
        def forward(model: Any, batch: Any) -> Any:
            if rank:
                raise error
            return model(**batch)

        return forward

    shortage = filet.OutOfMemoryError("no room", "pass", "2.00 GiB")
    calls: list[dict[str, Any]] = [
        {"forward_fn": with_nan},
        {"forward_fn": raises(shortage)},
        {"forward_fn": raises(KeyError("key"))},
        {"adapter_name": "other" if rank else "default"},
        {},
    ]
    said = []
    for index, call in enumerate(calls):
        model = peft_of(c)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if index == len(calls) - 1 and rank:  # while it is written into the model
            import filet.adapter.write as write

            def broken(*_: Any) -> None:
                raise ValueError("no place")

            write.describe = broken  # type: ignore[assignment]
        message = outcome_of(lambda model=model, call=call: initialise(model, rank, **call))
        same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        said.append((message, same))
    return said


def test_an_exception_ends_all_ranks_and_no_model_is_changed(tmp_path: Path) -> None:
    first, second = values(run(2, failing, tmp_path))
    assert all(same for _, same in first + second)
    for (heard, _), (raised, _) in zip(first, second, strict=True):
        kind, _, message = raised.partition(": ")
        if kind == "KeyError":
            assert heard == "RuntimeError: rank 1: KeyError: 'key'"
        else:
            assert heard == f"{kind}: rank 1: {message}"
    kinds = [raised.partition(":")[0] for raised, _ in second]
    assert kinds == [
        "FloatingPointError", "OutOfMemoryError", "KeyError", "ValueError", "ValueError",
    ]  # fmt: skip


def no_samples(rank: int, folder: Path) -> None:
    filet.collect_statistics(peft_of(case("llama")), [], show_progress_bar=False)


def test_no_sample_on_any_rank(tmp_path: Path) -> None:
    for said in errors(run(2, no_samples, tmp_path)):
        assert "gave no sample; expected at least one" in said


def killed(rank: int, folder: Path) -> None:
    def forward(model: Any, batch: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(**batch)

    model = peft_of(case("llama"))
    initialise(model, rank, forward_fn=forward)


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    ended = run(3, killed, tmp_path)
    assert ended[1].exitcode == -signal.SIGKILL
    for said in errors([ended[0], ended[2]]):
        assert said.startswith("ConnectionError: rank ")
        assert "lost another process" in said


def warned(rank: int, folder: Path) -> list[str]:
    def forward(model: Any, batch: Any) -> Any:
        warnings.warn("of all", stacklevel=1)
        if rank:
            warnings.warn("of others", UserWarning, stacklevel=1)
        return model(**batch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        initialise(peft_of(case("llama")), rank, forward_fn=forward)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_the_first_rank_shows_the_warnings(tmp_path: Path) -> None:
    first, second = values(run(2, warned, tmp_path))
    assert first == ["of all", "of all", "rank 1: of others"]
    assert second == []


@pytest.mark.parametrize("bar", [True, False])
def test_only_the_first_rank_has_a_bar(bar: bool, tmp_path: Path) -> None:
    first, second = values(run(2, bars, tmp_path, bar))
    assert (first, second) == ([not bar], [True])


def bars(rank: int, folder: Path, bar: bool) -> list[bool]:
    """Whether each bar is off."""
    import filet.collect.run as passes

    off = []

    class Bar(passes.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            off.append(kwargs["disable"])
            super().__init__(*args, **{**kwargs, "disable": True})

    passes.tqdm = Bar
    initialise(peft_of(case("llama")), rank, show_progress_bar=bar)
    return off
