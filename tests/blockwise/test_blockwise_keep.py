"""Data to keep in the blockwise engine: its moments, where it is kept, resumed runs, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    BOUNDARY,
    LAYERS,
    MARKS,
    Crash,
    Failing,
    adapter,
    assert_equal,
    assert_same_adapter,
    batches,
    boundary,
    in_step,
    initialize,
    kept,
    lora,
    model_folder,
    run_of,
)
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import filet
from filet import FiletConfig
from filet.blockwise import folder as folder_module
from filet.blockwise import work as work_module
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import choose_engine
from filet.blockwise.work import Work
from filet.collect import unrounded
from filet.model.chain import Parts
from filet_kernels import SecondMoment

pytestmark = MARKS

BOTH = BOUNDARY + boundary(kept())


def both(folder: Path, place: Path, rel: float = 1e-5, **more: Any) -> Any:
    """The report of the blockwise engine, equal to that of the one in memory; adapters as well."""
    settings = {"keep": kept(), **more}
    reports = [initialize(folder, place / e, e, **settings) for e in ("memory", "blockwise")]
    assert_equal(reports[1], reports[0], rel)
    assert reports[1].config["select"] == "contrast" and reports[1].modules
    return reports[1]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*keep PEFT's default")
@pytest.mark.parametrize("kind", ["llama", "one block", "gpt2", "mistral", "gemma3", "mixtral"])
def test_equals_the_engine_in_memory(kind: str, tmp_path: Path, device: torch.device) -> None:
    report = both(model_folder(kind), tmp_path, device=device)
    assert {module.kind for module in report.modules.values()} == {"contrast"}
    kept = {module.keep_tokens for module in report.modules.values()}
    assert kept == {report.keep["tokens"]}
    names = different(tmp_path / "blockwise", tmp_path / "memory")
    # Modules without a choice have random numbers, of either engine's own.
    found = [name for name in names if any(module in name for module in report.modules)]
    assert device.type == "cuda" or not found


def different(one: Path, other: Path) -> list[str]:
    """The tensors of two adapters that differ in a bit."""
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    return [name for name, value in mine.items() if not torch.equal(value, theirs[name])]


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": 0.3, "gamma": 0.5},
        {"select": "contrast", "start": "untouched"},
        {"share_inputs": False, "fisher": "sampled"},
        {"samples": 5},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    both(folder, tmp_path, config=FiletConfig(**settings))
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


@pytest.mark.parametrize("handed_on", [False, True])
def test_half_precision(
    handed_on: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the layers hand on y before it is rounded, as on a GPU."""
    monkeypatch.setattr(unrounded, "HANDS_ON", {"cpu"} if handed_on else set())
    both(folder, tmp_path, 1e-3, dtype=torch.bfloat16)


def test_targets_in_some_blocks_and_padding_on_the_left(folder: Path, tmp_path: Path) -> None:
    chosen = lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 4])
    report = both(
        folder, tmp_path, lora_config=chosen, batches=batches("left"), keep=kept(side="left")
    )
    assert len(report.modules) == 4


# Its moments.


def whole(moment: SecondMoment) -> Tensor:
    lower = moment.sum.double().tril()
    return lower + lower.tril(-1).T


def test_moments_are_those_of_the_other_engine_and_of_the_formula(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ v vᵀ over the tokens that are no padding, of the first samples, labels or none."""
    chosen: dict[str, SecondMoment] = {}
    choose = work_module.choose

    def noted(targets: Any, moments: Any, *args: Any, **more: Any) -> Any:
        assert args[-1] is not None
        chosen.update(args[-1])
        return choose(targets, moments, *args, **more)

    monkeypatch.setattr(work_module, "choose", noted)
    config, keep = FiletConfig(samples=5), [{**batch, "labels": "none"} for batch in kept()]
    with run_of(folder, tmp_path, config=config, keep=iter(keep)) as run:
        run.sweep()
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft_model = get_peft_model(model, lora())
    statistics = filet.collect_statistics(
        peft_model, batches(), config, show_progress_bar=False, keep=kept()
    )
    assert statistics.keep is not None and statistics.keep.keys() == chosen.keys()
    given: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for name in chosen:
        model.get_submodule(name).get_base_layer().register_forward_pre_hook(
            lambda module, args, name=name: given[name].append(args[0].detach())
        )
    samples = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in kept()
        for i in range(len(batch["input_ids"]))
    ][:5]
    for sample in samples:
        length = int(sample["attention_mask"].sum())
        with torch.no_grad():
            model(input_ids=sample["input_ids"][:, :length])
    for name, moment in chosen.items():
        theirs = statistics.keep[name]
        assert moment.space == theirs.space and int(moment.count) == int(theirs.count), name
        assert float((whole(moment) - whole(theirs)).norm() / whole(theirs).norm()) < 1e-6, name
        v = torch.cat([x[0] for x in given[name]]).double()
        if moment.space == "y":
            v = v @ model.get_submodule(name).get_base_layer().weight.detach().double().T
        assert int(moment.count) == len(v) == sum(int(s["attention_mask"].sum()) for s in samples)
        assert float((whole(moment) - v.T @ v).norm() / (v.T @ v).norm()) < 1e-5, name


def test_it_has_no_part_in_the_loss_and_is_shared_as_the_task_is(
    folder: Path, tmp_path: Path
) -> None:
    plain = initialize(folder, tmp_path / "plain")
    report = initialize(folder, tmp_path / "out", keep=kept())
    for key in ("samples", "tokens", "loss_terms", "data"):
        assert getattr(report, key) == getattr(plain, key)
    for name, module in report.modules.items():
        assert module.shared_input == plain.modules[name].shared_input
        assert module.output_tokens == plain.modules[name].output_tokens
    assert different(tmp_path / "out", tmp_path / "plain")


# Where it is kept.


@pytest.mark.parametrize(
    ("arenas", "scratch", "stride", "on_disk"),
    [(LAYERS + 2, False, 1, 0), (5, True, 1, LAYERS), (6, False, 2, 0)],
    ids=["host", "disk", "recomputed"],
)
def test_where_block_inputs_go_makes_no_difference(
    arenas: int, scratch: bool, stride: int, on_disk: int, folder: Path, tmp_path: Path
) -> None:
    """The data to keep is part of every boundary, and of no gradient."""
    place = tmp_path / "scratch" if scratch else None
    more: Any = {"keep": kept(), "scratch": place, "show_progress_bar": True}
    with run_of(folder, tmp_path, host_memory=arenas * BOTH, **more) as run:
        run.sweep()
        report = run.write(tmp_path / "out")
        assert run.plan is not None and run.boundaries is not None
        assert (run.plan.stride, run.plan.on_disk) == (stride, on_disk)
        assert run.plan.scratch_bytes == on_disk * BOTH
        assert run.plan.host_bytes >= run.boundaries.pool.made * BOTH
        assert run.boundaries.layout.nbytes == BOTH
        assert len(run.times.blocks["recomputed"]) == run.plan.recomputed == (stride == 2) * 2
    assert_equal(report, initialize(folder, tmp_path / "memory", "memory", keep=kept()), 1e-5)


def test_host_memory_for_the_task_alone_is_too_little(folder: Path, tmp_path: Path) -> None:
    least = 6 * BOUNDARY  # every second block's inputs
    initialize(folder, tmp_path / "task", host_memory=least)
    with pytest.raises(ValueError, match=r"host_memory of at least"):
        initialize(folder, tmp_path / "both", host_memory=least, keep=kept())


def test_a_gradient_is_written_without_it(folder: Path, tmp_path: Path) -> None:
    failing = in_step(disk=Failing(Crash()))
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=failing, keep=kept())
    (gradient,) = (tmp_path / "out.filet-run").glob("gradient-*")
    size = gradient.stat().st_size
    # The values, what they are of, and three numbers, the last of which is that one's length.
    assert size == BOUNDARY + int.from_bytes(gradient.read_bytes()[-8:], "little") + 24
    with run_of(folder, tmp_path, run_folder=tmp_path / "out.filet-run", keep=kept()) as run:
        run.sweep()
        blocks = range(run.plan.blocks[1])  # type: ignore[union-attr]
        names = [n for n in run.model.targets if int(n.split(".")[2]) in blocks]
        shapes = [run.model.targets[name].shape for name in names]
        content = sum(4 * 4 * n + 8 * n for _, n in shapes)
        assert run.journal.reserved == 2 * size + content


@pytest.mark.parametrize("keep", [False, True])
def test_the_choice_of_the_engine_counts_its_moments(
    keep: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory that holds the weights and the task's moments, but not half as many again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = sum(-(-p.nbytes // 256) * 256 for p in model.parameters())
    moments = 4 * sum(
        min(p.shape) ** 2
        for name, p in model.named_parameters()
        if "layers" in name and p.dim() == 2
    )
    free = int((weights + 2.5 * moments) / 0.75)
    monkeypatch.setattr(folder_module, "available_on_host", lambda: free)
    engine = choose_engine(folder, lora(), torch.device("cpu"), keep=keep)
    assert engine == ("blockwise" if keep else "memory")


# A run that was killed.


@pytest.mark.parametrize("sweep", ["forward", "reverse", "to keep"])
def test_a_run_that_failed_goes_on(
    sweep: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward sweep, in the backward of a block, in the forward of the data to keep."""
    initialize(folder, tmp_path / "whole", keep=kept())
    run_block, armed = Parts.run_block, True

    def failing(parts: Parts, block: int, *args: Any) -> Tensor:
        here = (
            block == 2
            and {
                "forward": not torch.is_grad_enabled(),
                "reverse": torch.is_grad_enabled(),
                "to keep": calls.get(block, 0) == len(batches()),
            }[sweep]
        )
        if armed and here:
            raise Crash
        if torch.is_grad_enabled():
            calls[block] = calls.get(block, 0) + 1
        return run_block(parts, block, *args)

    calls: dict[int, int] = {}
    monkeypatch.setattr(Parts, "run_block", failing)
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=in_step(), keep=kept())
    run = tmp_path / "out.filet-run"
    finished = {path.name for path in run.glob("block-*")}
    assert len(finished) == (0 if sweep == "forward" else LAYERS - 3)
    armed = False
    calls.clear()
    initialize(folder, tmp_path / "out", machine=in_step(), keep=kept())
    again = {block for block, times in calls.items() if times and block > 0}
    assert again == set(range(1, LAYERS if sweep == "forward" else 3))
    assert not different(tmp_path / "out", tmp_path / "whole")


def changed(keep: Sequence[dict[str, Tensor]], key: str) -> list[dict[str, Tensor]]:
    """The same but for one number of a tensor."""
    other = [{**batch, key: batch[key].clone()} for batch in keep]
    other[1][key][0, 0] += 1 if key == "input_ids" else -1
    return other


def test_resuming_with_other_data_to_keep_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=in_step(disk=Failing(Crash())), keep=kept())
    mask, ids = (changed(kept(), key) for key in ("attention_mask", "input_ids"))
    for other in (None, kept(3), kept()[:1], mask, ids):
        with pytest.raises(ValueError, match=r"not this one: keep is '\w+' there and"):
            initialize(folder, tmp_path / "out", keep=other)
    initialize(folder, tmp_path / "out", keep=kept(size=2))  # the same, in other batches
    report = initialize(folder, tmp_path / "memory", "memory", keep=kept(size=2))
    assert_equal(filet.FiletReport.load(tmp_path / "out"), report, 3e-5)


def test_a_shortage_says_where(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, left = Work.inputs, 0

    def short(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")
        inputs(*args)

    monkeypatch.setattr(Work, "inputs", short)
    for rehearsed, place in (
        (0, "the rehearsal of block 0 on the largest batch, 4×9 and 3×9 tokens"),
        (3, f"the forward of the data to keep in block {LAYERS - 1}"),
    ):
        left = rehearsed
        with pytest.raises(filet.OutOfMemoryError, match=f"{place}: 2.50 GiB asked for"):
            initialize(folder, tmp_path / "out", keep=kept())


# What is refused, before any block is computed.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "self"}, r"^keep='self' .* which the blockwise engine never has; expected batch"),
        ({"keep": "selbst"}, "keep='selbst'; expected batches, or 'self'"),
        ({"keep": []}, "the data to keep gave no sample"),
        ({"keep": [{"labels": torch.ones(2, 3)}]}, "no input_ids"),
        ({"keep": [{"input_ids": torch.full((2, 3), 10**6)}]}, "keep: input_ids of batch 0 has"),
        ({"config": FiletConfig(select="min")}, "keep= has no effect with select='min'"),
        ({"config": FiletConfig(scaling="singular")}, "no effect with select='contrast'"),
        ({"lora_config": lora(r=17)}, r"rank 17 exceeds the 16 that a product B A"),
        ({"keep": None, "config": FiletConfig(select="contrast")}, "without moments of data to ke"),
    ],
)
def test_refused(
    settings: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Blockwise, "sweep", lambda run: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message) as refused:
        initialize(folder, tmp_path / "out", **{"keep": kept(), **settings})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.filet-run").exists()
