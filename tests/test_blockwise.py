"""The blockwise engine, block by block from a folder, against the one that holds the whole model.

On a CPU both run the very same operations in the same order, in float32 and bfloat16, so their
energies are equal to the bit here; the tolerances below are what is asked of them anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import filet
import models
import smollm2
from filet import FiletConfig, FiletReport
from filet.blockwise import boundaries, weights
from filet.blockwise import engine as engine_module
from filet.blockwise import folder as folder_module
from filet.blockwise import stream as stream_module
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import empty_model
from filet.blockwise.keeping import Keeping
from filet.blockwise.stream import WeightStream
from filet.blockwise.weights import ShardedWeights
from filet.cli.main import main
from filet.collect import hooks, unrounded
from filet.initialize import initialize_folder
from filet.model.chain import Parts
from filet.model.checkpoint import Entry, entries
from filet.model.folder import load_model

SMALL = {
    "vocab_size": models.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MOE = {**SMALL, "num_experts_per_tok": 2}
LAYERS = 5

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's, of patterns that it made itself for experts.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]

# Sliding windows shorter than the samples: blocks of one model get different masks.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: models.llama(LAYERS),
    "gpt2": lambda: models.case("gpt2").model,
    "opt": lambda: models.case("opt").model,
    "one block": lambda: models.llama(1),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, sliding_window_pattern=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, head_dim=16)
    ),
}


IS_BEHIND = Blockwise._is_behind


def wait_written(run: Blockwise) -> None:
    wait([*run._saved, *([run._writing] if run._writing else [])])


@pytest.fixture(autouse=True)
def disk_in_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is written before the next begins: what a test finds does not depend on time."""
    if request.node.name == "test_killed_at_random":
        return

    def waits(run: Blockwise) -> bool:
        wait_written(run)
        return IS_BEHIND(run)

    monkeypatch.setattr(Blockwise, "_is_behind", waits)


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all the rest."""
    if request.node.name != "test_the_folder_is_what_save_as_lora_writes":
        monkeypatch.setattr(FiletReport, "plot", lambda report, path: Path(path).touch())


def lora(**settings: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **settings})


def batches(side: str = "right") -> list[dict[str, Tensor]]:
    return list(models.loader(models._text(1), side=side))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of model -> its folder, in several shards."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.exists():
            model = models.randomised(copy.deepcopy(MODELS[kind]()))
            model.save_pretrained(path, max_shard_size="20KB")
            assert len(list(path.glob("*.safetensors"))) > 1
        return path

    return folder


@pytest.fixture
def folder(folders: Callable[[str], Path]) -> Path:
    return folders("llama")


def initialize(folder: Path, output: Path, engine: str = "blockwise", **more: Any) -> FiletReport:
    settings: dict[str, Any] = {
        "batches": batches(),
        "lora_config": lora(),
        "show_progress_bar": False,
        "engine": engine,
        "device": "cpu",
        **more,
    }
    return initialize_folder(folder, output=output, **settings)


def assert_equal(one: FiletReport, other: FiletReport, rel: float, *, choices: bool = True) -> None:
    """Same choices, energies to ``rel``; everything else the same."""
    assert one.modules.keys() == other.modules.keys()
    for name, mine in one.modules.items():
        theirs = other.modules[name]
        torch.testing.assert_close(
            mine.energies, theirs.energies, rtol=rel, atol=0, equal_nan=True, msg=name
        )
        assert not choices or torch.equal(mine.indices, theirs.indices), name
        for key in ("shape", "rank", "input_space", "output_space", "input_tokens",
                    "output_tokens", "shared_input"):  # fmt: skip
            assert getattr(mine, key) == getattr(theirs, key), (name, key)
    for key in ("left_default", "samples", "tokens", "loss_terms"):
        assert getattr(one, key) == getattr(other, key), key


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        # The engines form the head's products over other rows, so the gradients' last bits differ.
        error = (value - theirs[name]).abs().max()
        assert error <= 1e-5 * theirs[name].abs().max(), (name, error)


# Against the engine that holds the whole model.


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*keep PEFT's default")
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_engine_in_memory(
    kind: str, folders: Callable[[str], Path], tmp_path: Path, device: torch.device
) -> None:
    reports = {
        engine: initialize(folders(kind), tmp_path / engine, engine, device=device)
        for engine in ("memory", "blockwise")
    }
    assert_equal(reports["blockwise"], reports["memory"], 1e-5)
    assert reports["blockwise"].modules
    assert all(report.peak_memory > 0 for report in reports.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"fisher": "sampled"},
        {"select": "max", "scaling": "singular", "samples": 7},
        {"normalization": "sum", "share_inputs": False},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = FiletConfig(**settings)
    reports = {
        engine: initialize(folder, tmp_path / engine, engine, config=config)
        for engine in ("memory", "blockwise")
    }
    assert_equal(reports["blockwise"], reports["memory"], 1e-5)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "olora", "loftq", "lora_ga"])
def test_a_changed_base_is_refused_before_the_model_is_loaded(
    init: str, engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("PEFT was called")

    chosen = lora()
    chosen.init_lora_weights = init  # type: ignore[assignment]
    monkeypatch.setattr("filet.model.targets.get_peft_model", never)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    with pytest.raises(ValueError, match=f"lora_config has init_lora_weights='{init}', by which"):
        initialize(folder, tmp_path / "out", engine, lora_config=chosen)
    assert list(tmp_path.iterdir()) == []


def test_padding_on_the_left(folder: Path, tmp_path: Path) -> None:
    reports = [
        initialize(folder, tmp_path / engine, engine, batches=batches("left"))
        for engine in ("memory", "blockwise")
    ]
    assert_equal(reports[1], reports[0], 1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 1e-3), (torch.float16, 5e-3)])
def test_half_precision(dtype: torch.dtype, rel: float, folder: Path, tmp_path: Path) -> None:
    """float16 differs: the gradient is scaled at every boundary, not once for the whole pass.

    Measured here: 2.2e-3 between the engines, and 1.3e-2 of each from float32; two directions
    closer than that may change places.
    """
    reports = [
        initialize(folder, tmp_path / engine, engine, dtype=dtype)
        for engine in ("memory", "blockwise")
    ]
    assert_equal(reports[1], reports[0], rel, choices=dtype != torch.float16)


def test_targets_in_some_blocks(folder: Path, tmp_path: Path) -> None:
    chosen = lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 4])
    reports = [
        initialize(folder, tmp_path / engine, engine, lora_config=copy.deepcopy(chosen))
        for engine in ("memory", "blockwise")
    ]
    assert_equal(reports[1], reports[0], 1e-5)
    assert len(reports[1].modules) == 4


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_real_model(dtype: torch.dtype, rel: float, tmp_path: Path, device: torch.device) -> None:
    folder = smollm2.prepare()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(100, 40000, (2, 24), generator=generator)
    data = [{"input_ids": ids[i : i + 1], "labels": ids[i : i + 1]} for i in range(2)]
    chosen = lora(r=8, layers_to_transform=[27, 29], target_modules=["v_proj", "up_proj"])
    reports = [
        initialize(
            folder, tmp_path / engine, engine, batches=data, device=device, dtype=dtype,
            lora_config=copy.deepcopy(chosen),
        )
        for engine in ("memory", "blockwise")
    ]  # fmt: skip
    assert_equal(reports[1], reports[0], rel)


# The output.


def test_the_folder_is_what_save_as_lora_writes(folder: Path, tmp_path: Path) -> None:
    report = initialize(folder, tmp_path / "memory", "memory")
    initialize(folder, tmp_path / "blockwise")
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")
    for name in ("adapter_config.json", "filet.json"):
        mine, theirs = (
            json.loads((tmp_path / engine / name).read_text()) for engine in ("blockwise", "memory")
        )
        assert mine == theirs, name
    saved = FiletReport.load(tmp_path / "blockwise")
    assert_equal(saved, report, 1e-5)
    files = {path.name for path in (tmp_path / "blockwise").iterdir()}
    assert files == {path.name for path in (tmp_path / "memory").iterdir()}
    assert not (tmp_path / "blockwise.filet-run").exists()

    model = filet.load(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "blockwise")
    batch = {key: value for key, value in batches()[0].items() if key != "labels"}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


def test_loaded_onto_another_dtype(folder: Path, tmp_path: Path) -> None:
    """The same weights, and not: what to load them as is said."""
    initialize(folder, tmp_path / "out", "memory")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    message = (
        rf"^{tmp_path / 'out'} belongs to a base model in float32: the weight of model\.layers\.0\."
        r"self_attn\.q_proj is bfloat16 in this model; expected float32: .*dtype=torch\.float32"
    )
    with pytest.raises(ValueError, match=message):
        filet.load(base, tmp_path / "out")


# Memory, disk, recomputation.


def run_of(folder: Path, place: Path, model: Any = None, **more: Any) -> Blockwise:
    model = model or empty_model(folder)
    settings: dict[str, Any] = {
        "batches": batches(),
        "lora_config": lora(),
        "config": FiletConfig(),
        "device": torch.device("cpu"),
        "run_folder": place / "run",
        "show_progress_bar": False,
        **more,
    }
    return Blockwise(model, ShardedWeights(folder, model), **settings)


BOUNDARY = sum(
    -(-batch["input_ids"].numel() * SMALL["hidden_size"] * 4 // 4096) * 4096 for batch in batches()
)


@pytest.mark.parametrize(
    ("arenas", "scratch", "stride", "on_disk"),
    [
        (LAYERS + 2, False, 1, 0),
        (5, True, 1, LAYERS),
        (6, True, 1, LAYERS - 1),
        (6, False, 2, 0),
    ],
    ids=["host", "disk", "both", "recomputed"],
)
def test_where_block_inputs_go_makes_no_difference(
    arenas: int,
    scratch: bool,
    stride: int,
    on_disk: int,
    folder: Path,
    tmp_path: Path,
    device: torch.device,
) -> None:
    place = tmp_path / "scratch" if scratch else None
    with run_of(
        folder, tmp_path, host_memory=arenas * BOUNDARY, scratch=place, device=device
    ) as run:
        run.sweep()
        report = run.write(tmp_path / "out")
        assert run.plan is not None
        assert (run.plan.stride, run.plan.on_disk) == (stride, on_disk)
        assert run.pool.made <= arenas
        assert run.plan.scratch_bytes == on_disk * BOUNDARY
        assert run.plan.host_bytes >= run.pool.made * BOUNDARY
        assert [len(run.block_seconds[sweep]) for sweep in ("forward", "reverse")] == [LAYERS] * 2
        again = len(run.block_seconds["recomputed"])
        assert again == run.plan.recomputed == (2 if stride == 2 else 0)
    assert not scratch or not (tmp_path / "scratch").exists()
    assert_equal(report, initialize(folder, tmp_path / "memory", "memory", device=device), 1e-5)
    assert device.type != "cpu" or run.plan.device_bytes == 0
    assert device.type != "cuda" or run.plan.device_bytes > 0


@pytest.mark.parametrize("disk", [0, 1, 5])
@pytest.mark.parametrize(("first", "last"), [(0, 5), (2, 8), (3, 3), (0, 79)])
def test_plans_keep_what_they_hold(first: int, last: int, disk: int) -> None:
    """Every block's input is kept or follows a kept one by less than the stride."""
    strides = []
    for host in range(100):
        try:
            keeping = Keeping.choose(first, last, host, disk, 2**30)
        except ValueError as error:
            assert not strides  # what fits also fits with more memory
            # It says what would do, without a disk and with one.
            alone, beside, needed = map(
                float, re.findall(r"([\d.]+) GiB(?=,| and a| free)", str(error))[-3:]
            )
            Keeping.choose(first, last, int(alone), 0, 1)
            Keeping.choose(first, last, int(beside), int(needed * 0.9 + 0.1), 1)
            continue
        strides.append(keeping.stride)
        assert keeping.kept[0] == first
        for block in range(first, last + 1):
            assert any(block - keeping.stride < kept <= block for kept in keeping.kept)
        assert len(keeping.on_disk) <= disk
        assert keeping.arenas <= host
    assert strides == sorted(strides, reverse=True)
    assert strides[-1] == 1


def test_the_plan_is_said_before_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    initialize(folder, tmp_path / "out", show_progress_bar=True)
    said = capsys.readouterr().err
    assert said.index(f"plan          {LAYERS} blocks forward, {LAYERS} in reverse") < said.index(
        "FILet forward"
    )
    for word in ("host", "disk", "time", "tokens/s", "waited", "page-locked"):
        assert word in said
    assert "recomputed" not in said
    initialize(folder, tmp_path / "less", host_memory=6 * BOUNDARY, show_progress_bar=True)
    said = capsys.readouterr().err
    assert f"3 of {LAYERS} boundaries are kept (k = 2), 2 blocks computed once more" in said


def test_auto(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Blockwise] = []
    sweep = Blockwise.sweep
    monkeypatch.setattr(Blockwise, "sweep", lambda run: (swept.append(run), sweep(run)))
    initialize(folder, tmp_path / "fits", "auto")
    assert not swept
    monkeypatch.setattr(folder_module, "available_on_host", lambda: 400_000)
    initialize(folder, tmp_path / "does not", "auto", host_memory=2**20)
    assert swept
    assert_same_adapter(tmp_path / "fits", tmp_path / "does not")


# Routing.


@pytest.mark.parametrize("handed_on", [False, True])
def test_experts_are_chosen_alike_in_both_sweeps(
    handed_on: bool,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, also where hooks form the output of o_proj (32 of 64) as they do on a GPU.

    They do it in an order of their own, which is played here by two bits that are off.
    """
    monkeypatch.setattr(unrounded, "HANDS_ON", {"cpu"} if handed_on else set())
    plain = unrounded.unrounded
    monkeypatch.setattr(hooks, "unrounded", lambda *args: plain(*args) * (1 + 2**-6))
    folder = folders("qwen3_moe")
    seen: dict[tuple[str, bool], list[Tensor]] = {}
    model = empty_model(folder, dtype=torch.bfloat16)
    with run_of(folder, tmp_path, model=model) as run:
        for name, module in run.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda module, args, output, name=name: seen.setdefault(
                        (name, torch.is_grad_enabled()), []
                    ).append(torch.cat([each.detach().float().flatten() for each in output]))
                )
        monkeypatch.setattr(Blockwise, "_rehearse", lambda *_: None)
        run.sweep()
    names = {name for name, _ in seen}
    assert len(names) == SMALL["num_hidden_layers"]
    for name in names:
        forward, recomputed = seen[name, False], seen[name, True]
        assert len(forward) == len(recomputed) == len(batches())
        assert all(map(torch.equal, forward, recomputed))


# Resuming.


class Crash(Exception):
    pass


# What they test knows no device; `make test` on a CPU runs them.
forks = pytest.mark.skipif(
    torch.cuda.is_available(), reason="it forks, which autograd forbids once it has used a GPU"
)


def in_child(function: Callable[[], object]) -> multiprocessing.Process:
    """Run in a process of its own, which a signal can kill."""

    def run() -> None:
        torch.set_num_threads(1)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def block_files(run: Path) -> dict[str, tuple[int, int]]:
    """Of the finished blocks, those that a gradient follows: what tells if one is written again."""
    files = {int(path.stem.removeprefix("block-")): path for path in run.glob("block-*")}
    gradients = [int(path.stem.removeprefix("gradient-")) for path in run.glob("gradient-*")]
    if files.keys() < set(range(LAYERS)):
        lowest = min(gradients, default=LAYERS - 1)
        # None comes before the blocks that it finishes.
        assert files.keys() >= set(range(lowest + 1, LAYERS))
        files = {block: path for block, path in files.items() if block > lowest}
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files.values()}


def assert_untouched(before: dict[str, tuple[int, int]], run: Path) -> None:
    after = block_files(run)
    assert {name: after.get(name) for name in before} == before


def killed_at_rename(number: int, folder: Path, output: Path) -> int:
    """Run until just before the so manieth file takes its place; the exit code."""

    def run() -> None:
        rename, count = os.replace, 0

        def replace(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)

        os.replace = replace  # type: ignore[assignment]
        initialize(folder, output, **CHEAP)

    process = in_child(run)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


CHEAP: dict[str, Any] = {"lora_config": lora(target_modules=["q_proj", "up_proj"])}


@forks
def test_killed_before_any_file_takes_its_place(folder: Path, tmp_path: Path) -> None:
    """A run is killed at its first file, goes on and is killed at its second, ..."""
    initialize(folder, tmp_path / "whole", **CHEAP)
    output, run = tmp_path / "out", tmp_path / "out.filet-run"
    kills = 0
    before: dict[str, tuple[int, int]] = {}
    # The manifest, the head's gradient, and two files a block but for the last.
    for number in (1, 2, 3, 3, 2, 4, 3, 2, 3, 2, 2):
        if killed_at_rename(number, folder, output) == 0:
            break
        kills += 1
        assert not output.exists()
        assert_untouched(before, run)
        before = block_files(run)
    else:
        initialize(folder, output, **CHEAP)
    assert kills >= 6
    assert_same_adapter(output, tmp_path / "whole")
    assert_equal(FiletReport.load(output), FiletReport.load(tmp_path / "whole"), 0)
    assert not run.exists()


@forks
def test_killed_at_random(folder: Path, tmp_path: Path) -> None:
    output, run = tmp_path / "out", tmp_path / "out.filet-run"
    start = time.perf_counter()
    process = in_child(lambda: initialize(folder, tmp_path / "whole"))
    process.join()
    assert process.exitcode == 0
    whole = time.perf_counter() - start
    draw = random.Random(5)
    kills = 0
    while kills < 6:
        if output.exists():  # it was quicker than we were
            shutil.rmtree(output)
        before = block_files(run)
        process = in_child(lambda: initialize(folder, output))
        process.join(draw.uniform(0.1, 1.0) * whole)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if not output.exists():
            assert_untouched(before, run)
    if not output.exists():
        initialize(folder, output)
    assert_same_adapter(output, tmp_path / "whole")


def interrupt(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 2
) -> Callable[[], None]:
    """Let writing arenas fail after so many times; returns what ends that."""
    save, count = boundaries.Arena.save, 0

    def failing(*args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise error
        save(*args, **more)

    monkeypatch.setattr(boundaries.Arena, "save", failing)
    return lambda: monkeypatch.setattr(boundaries.Arena, "save", save)


def test_a_full_disk_is_said_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize(folder, tmp_path / "whole")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    end = interrupt(monkeypatch, full, after=3)
    with pytest.raises(OSError, match="No space left"):
        initialize(folder, tmp_path / "out")
    run = tmp_path / "out.filet-run"
    before = block_files(run)
    assert len(before) == 2
    assert not list(run.glob(".*"))
    end()
    gradients = []
    sweep = Blockwise._reverse_block

    def watched(self: Blockwise, block: int, *args: Any) -> Any:
        gradients.append(block)
        assert_untouched(before, run)
        return sweep(self, block, *args)

    monkeypatch.setattr(Blockwise, "_reverse_block", watched)
    initialize(folder, tmp_path / "out")
    assert gradients == list(range(LAYERS - 3, -1, -1))
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "call", "place"),
    [
        ("run_block", 0, "the rehearsal of block 0 on the largest batch, 4×9 tokens"),
        ("epilogue", 0, "the head and the loss"),
        ("run_block", -1, "the forward and backward of block 0"),
    ],
)
def test_a_shortage_says_where_and_the_run_goes_on(
    method: str,
    call: int,
    place: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, calls = getattr(Parts, method), 0
    limit = 10**9

    def short(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")
        return done(*args)

    monkeypatch.setattr(Parts, method, short)
    initialize(folder, tmp_path / "whole")
    limit, calls = call % calls, 0
    with pytest.raises(filet.OutOfMemoryError, match=f"{place}: 2.50 GiB asked for") as caught:
        initialize(folder, tmp_path / "out")
    assert caught.value.phase == "blockwise"
    assert "--batch-size" in str(caught.value) and "--engine" not in str(caught.value)
    limit = 10**9
    initialize(folder, tmp_path / "out")
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("killed", "finished"), [(3, 5), (1, 2)])
def test_a_slow_disk_does_not_hold_up_the_run(
    killed: int, finished: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were done meanwhile are finished together, and a resumed run knows them."""
    initialize(folder, tmp_path / "whole")
    asked = 0

    def is_behind(run: Blockwise) -> bool:
        nonlocal asked
        asked += 1
        return asked < 3

    sweep = Blockwise._reverse_block
    redone = []

    def watched(run: Blockwise, block: int, *args: Any) -> Any:
        redone.append(block)
        if block == killed:
            wait_written(run)
            raise Crash
        return sweep(run, block, *args)

    monkeypatch.setattr(Blockwise, "_is_behind", is_behind)
    monkeypatch.setattr(Blockwise, "_reverse_block", watched)
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out")
    run = tmp_path / "out.filet-run"
    # All have their files; finished are those that the third's gradient follows.
    assert len(list(run.glob("block-*"))) == LAYERS - 1 - killed
    before = block_files(run)
    assert sorted(before) == [f"block-{block}.safetensors" for block in range(finished, LAYERS)]
    assert [path.name for path in run.glob("gradient-*")] == [f"gradient-{finished - 1}.raw"]
    killed = -1
    redone.clear()
    initialize(folder, tmp_path / "out")
    assert redone == list(range(finished - 1, -1, -1))
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("arenas", [LAYERS + 2, LAYERS + 1], ids=["kept", "recomputed"])
def test_a_gradient_that_no_block_will_read_is_given_up(
    arenas: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk so slow that the first gradient is not there when all blocks are done.

    It has its arena all that time; the least host memory that is taken is enough.
    """
    initialize(folder, tmp_path / "whole")
    save = boundaries.Arena.save
    written = []

    def slow(
        arena: boundaries.Arena, path: Path, trailer: bytes, abandon: threading.Event | None
    ) -> None:
        assert abandon is not None
        assert abandon.wait(60)
        written.append(path)
        save(arena, path, trailer, abandon)

    monkeypatch.setattr(boundaries.Arena, "save", slow)
    monkeypatch.setattr(Blockwise, "_is_behind", IS_BEHIND)
    with run_of(folder, tmp_path, host_memory=arenas * BOUNDARY) as run:
        run.sweep()
        assert run.pool.made == arenas == run.keeping.arenas
        names = sorted(path.name for path in run.folder.iterdir())
        blocks = [f"block-{block}.safetensors" for block in range(LAYERS)]
        assert names == [*blocks, "lock", "manifest.json"]
        run.write(tmp_path / "out")
    assert len(written) == 1
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


def test_no_gradient_comes_before_the_blocks_that_it_finishes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, save_block = boundaries.Arena.save, Blockwise._save_block
    there = {block: threading.Event() for block in range(LAYERS)}

    def quick(arena: boundaries.Arena, path: Path, *args: Any) -> None:
        save(arena, path, *args)
        there[int(path.name.split(".")[1].removeprefix("gradient-"))].set()

    def slow(run: Blockwise, finished: Any) -> None:
        if finished.block > run.first:
            assert there[finished.block - 1].wait(60)
            time.sleep(0.05)  # for a rename that does not wait
            assert not run._gradient_file(finished.block - 1).exists()
        save_block(run, finished)

    def is_behind(run: Blockwise) -> bool:
        wait([run._writing] if run._writing else [])
        return IS_BEHIND(run)

    monkeypatch.setattr(boundaries.Arena, "save", quick)
    monkeypatch.setattr(Blockwise, "_save_block", slow)
    monkeypatch.setattr(Blockwise, "_is_behind", is_behind)
    initialize(folder, tmp_path / "out", **CHEAP)
    assert all(event.is_set() for event in there.values())


@pytest.mark.parametrize("refused", [None, "open", "write"])
def test_past_the_page_cache(
    refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system can; elsewhere as any file."""
    error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    opened, written, direct = os.open, os.write, []

    def open_file(path: Any, flags: int, mode: int = 0o777) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise error
        file = opened(path, flags, mode)
        if Path(path).suffix == ".raw" and Path(path).name != "direct.raw":
            direct.append(bool(flags & os.O_DIRECT))
        return file

    def write(file: int, data: Any) -> int:
        if refused == "write" and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise error
        return written(file, data)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "write", write)
    layout = boundaries.Layout([torch.Size((3, 1000)), torch.Size((7,))], torch.float32)
    arena = boundaries.Arena(layout, False)
    arena.views[0].copy_(torch.arange(3000.0).view(3, 1000))
    monkeypatch.setattr(boundaries, "_PIECE", 4096)
    before = arena.buffer.clone()
    pool = boundaries.ArenaPool(layout, 1, CPU)
    inputs = boundaries.BlockInputs(pool, tmp_path)
    assert not list(tmp_path.iterdir())
    assert min(inputs.speed(arena)) > 0
    inputs.write(3, arena)
    wait(inputs._written.values())
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == layout.nbytes == 4 * 4096
    again = inputs.take(3)
    assert torch.equal(again.buffer, before) and torch.equal(arena.buffer, before)
    assert not list(tmp_path.iterdir())
    assert len(direct) == 4 and set(direct) == {refused is None}
    inputs.write(4, arena)
    wait(inputs._written.values())
    file = tmp_path / "inputs-4.raw"
    file.write_bytes(b"short")
    pool.put(again)
    with pytest.raises(ValueError, match=f"has 5 bytes; expected {layout.nbytes}"):
        inputs.take(4)
    inputs.close()
    pool.close()


@pytest.mark.parametrize("one_disk", [True, False])
def test_the_plan_knows_a_slow_scratch_disk(
    one_disk: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = boundaries._write, boundaries.read_at
    disk = threading.Lock() if one_disk else contextlib.nullcontext()

    def slow_write(*args: Any) -> None:
        with disk:
            time.sleep(0.1)
            write(*args)

    def slow_read(*args: Any) -> None:
        with disk:
            time.sleep(0.2)
            read(*args)

    monkeypatch.setattr(boundaries, "_write", slow_write)
    monkeypatch.setattr(boundaries, "read_at", slow_read)
    if not one_disk:
        monkeypatch.setattr(engine_module, "_on_one_disk", lambda *_: False)
    scratch = tmp_path / "scratch"
    with run_of(folder, tmp_path, host_memory=5 * BOUNDARY, scratch=scratch, **CHEAP) as run:
        run.sweep()
        assert run.plan is not None and run.plan.on_disk == LAYERS
        planned = sum(run.plan.seconds.values())
        took = sum(run.seconds[sweep] for sweep in run.plan.seconds)
    assert LAYERS * 0.3 < took
    assert abs(planned / took - 1) < 0.25, (run.plan.seconds, run.seconds)


def test_a_file_is_abandoned_between_two_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = boundaries.Layout([torch.Size((3, 1000))], torch.float32)
    arena = boundaries.Arena(layout, False)
    arena.views[0].copy_(torch.arange(3000.0).view(3, 1000))
    monkeypatch.setattr(boundaries, "_PIECE", 4096)
    path, abandon, synced = tmp_path / "file", threading.Event(), 0

    def sync(_: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 2:
            abandon.set()

    arena.save(path, b"end", threading.Event())
    again = boundaries.Arena(layout, False)
    assert again.load(path, 3) == b"end"
    assert torch.equal(again.views[0], arena.views[0])
    monkeypatch.setattr(os, "fdatasync", sync)
    with pytest.raises(boundaries.Abandoned):
        arena.save(path, b"end", abandon)
    assert path.stat().st_size == 2 * 4096


LAYOUT = boundaries.Layout([torch.Size((2, 8))], torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many arenas have been made and freed."""
    count = {"made": 0, "freed": 0}
    make, free = boundaries.Arena.__init__, boundaries.Arena.free

    def made(arena: boundaries.Arena, *args: Any) -> None:
        make(arena, *args)
        count["made"] += 1

    def freed(arena: boundaries.Arena) -> None:
        free(arena)
        count["freed"] += 1

    monkeypatch.setattr(boundaries.Arena, "__init__", made)
    monkeypatch.setattr(boundaries.Arena, "free", freed)
    return count


def test_arenas_made_ahead(arenas: dict[str, int]) -> None:
    pool = boundaries.ArenaPool(LAYOUT, 4, CPU, ahead=3)
    with pool.paused():
        before = arenas["made"]
        assert before + pool.making == 3
        assert arenas["made"] == before
    got = [pool.get() for _ in range(4)]  # the last is made for it
    assert len({id(arena) for arena in got}) == 4
    assert pool.made == 4 and pool.seconds_left() == 0
    # The limit is reached: whoever asks waits for one that comes back.
    with ThreadPoolExecutor(2) as threads:
        coming = [threads.submit(pool.get) for _ in range(2)]
        pool.put(got[0])
        pool.put(got[1])
        assert {id(each.result(60)) for each in coming} == {id(got[0]), id(got[1])}
        waiting = threads.submit(pool.get)
        pool.stop()
        with pytest.raises(RuntimeError, match="the run has ended"):
            waiting.result(60)
    pool.close()
    assert arenas == {"made": 4, "freed": 4}


def test_arenas_made_ahead_are_freed_after_an_exception(
    folder: Path, tmp_path: Path, arenas: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = boundaries.ArenaPool.__init__

    def ahead(pool: boundaries.ArenaPool, *args: Any) -> None:
        init(pool, *args[:3], 4)

    def fails(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(boundaries.ArenaPool, "__init__", ahead)
    monkeypatch.setattr(Blockwise, "_rehearse", fails)
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out")
    assert arenas["made"] == arenas["freed"] >= 1


def test_an_arena_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        boundaries._check(1, 2**30)  # what CUDA answers where too much is locked

    monkeypatch.setattr(boundaries.Arena, "__init__", fails)
    pool = boundaries.ArenaPool(LAYOUT, 2, CPU, ahead=1)
    with pytest.raises(ValueError, match=r"pinning 1\.00 GiB .* expected a smaller host_memory"):
        pool.get()
    pool.close()


def test_a_full_scratch_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after=1)
    with pytest.raises(OSError, match="No space left"):
        initialize(folder, tmp_path / "out", host_memory=5 * BOUNDARY, scratch=tmp_path / "scratch")
    assert not (tmp_path / "out.filet-run").exists()  # there was nothing to go on from
    assert not list((tmp_path / "scratch").iterdir())


def test_float16_resumes_with_its_scale(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize(folder, tmp_path / "whole", dtype=torch.float16)
    end = interrupt(monkeypatch, Crash(), after=3)
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", dtype=torch.float16)
    end()
    initialize(folder, tmp_path / "out", dtype=torch.float16)
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    end = interrupt(monkeypatch, Crash())
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out")
    end()
    return tmp_path / "out"


def test_resuming_with_anything_else_is_refused(
    interrupted: Path, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "out.filet-run"
    before = block_files(run)
    other = batches()
    other[1]["input_ids"][0, 0] += 1
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    shard = sorted(changed.glob("*.safetensors"))[0]
    weights = load_file(shard)
    next(iter(weights.values()))[0] += 1
    save_file(weights, shard, {"format": "pt"})
    for difference, named in (
        ({"batches": other}, "data is"),
        ({"config": FiletConfig(select="max")}, r"settings\.select is 'min' there and 'max' now"),
        ({"lora_config": lora(r=5)}, r"adapter\.r is 4 there and 5 now"),
        ({"dtype": torch.bfloat16}, "dtype is 'torch.float32' there and 'torch.bfloat16' now"),
        ({"folder": changed}, rf"model\.{shard.name} is"),
    ):
        with pytest.raises(ValueError, match=named):
            initialize(**{"folder": folder, "output": interrupted, **difference})
        assert_untouched(before, run)
    initialize(folder, interrupted, host_memory=2**20)  # this may differ


def test_a_run_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with (
        run_of(folder, tmp_path),
        pytest.raises(ValueError, match="in use by another process"),
        run_of(folder, tmp_path),
    ):
        pass


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_begins_while_a_folder_is_removed(
    finished: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of the removal it comes before, it is refused or has a folder of its own."""
    run_folder = tmp_path / "out.filet-run"
    same = {"run_folder": run_folder, **CHEAP}
    begun: list[Blockwise] = []

    def before(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def step(path: Any, *args: Any, **more: Any) -> Any:
            if Path(path).name.startswith((".out.filet-run", "out.filet-run")) and not begun:
                with contextlib.suppress(ValueError):  # in use by another process
                    begun.append(run_of(folder, tmp_path, **same).__enter__())
            return plain(path, *args, **more)

        monkeypatch.setattr(module, name, step)

    before(shutil, "rmtree")
    before(os, "rename")
    if finished:
        initialize(folder, tmp_path / "out", **CHEAP)
    else:
        interrupt(monkeypatch, Crash(), after=0)
        with pytest.raises(Crash):
            initialize(folder, tmp_path / "out", **CHEAP)
    (second,) = begun
    assert {path.name for path in run_folder.iterdir()} == {"lock", "manifest.json"}
    with pytest.raises(ValueError, match="in use"), run_of(folder, tmp_path, **same):
        pass
    second.__exit__()
    assert not run_folder.exists() and (tmp_path / "out").exists() == finished


def test_a_scratch_folder_belongs_to_one_run_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one output have two run folders, which do not lock each other."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    seen: list[tuple[Path, Path]] = []

    def entered(run: Blockwise) -> None:
        assert run.scratch is not None
        seen.append((run.folder, run.scratch))
        raise Crash

    monkeypatch.setattr(Blockwise, "__enter__", entered)
    for name in ("out", "link", "out"):
        with pytest.raises(Crash):
            initialize(folder, tmp_path / name, scratch=tmp_path / "scratch", **CHEAP)
    assert seen[0] == seen[2] and not {*seen[0]} & {*seen[1]}


def test_a_folder_of_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.filet-run").mkdir()
    (tmp_path / "out.filet-run" / "precious").write_text("")
    with pytest.raises(ValueError, match="no run of filet"):
        initialize(folder, tmp_path / "out")
    assert (tmp_path / "out.filet-run" / "precious").exists()


# What is refused.


def changed_config(folder: Path, goal: Path, **values: Any) -> Path:
    shutil.copytree(folder, goal)
    config = json.loads((goal / "config.json").read_text())
    (goal / "config.json").write_text(json.dumps({**config, **values}))
    return goal


def test_models_that_are_refused(folder: Path, tmp_path: Path) -> None:
    quantised = changed_config(
        folder, tmp_path / "quantised", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=16,
        )
    )  # fmt: skip
    bart.save_pretrained(tmp_path / "bart")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    wider = changed_config(folder, tmp_path / "wider", intermediate_size=50)
    deeper = changed_config(folder, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    holed = tmp_path / "holed"
    shutil.copytree(folder, holed)
    sorted(holed.glob("*.safetensors"))[1].unlink()
    for path, message in (
        (quantised, "is quantised"),
        (tmp_path / "bart", "encoder-decoder"),
        (pickled, "safetensors weights only"),
        (wider, r"has shape \(48, 32\) .* expected \(50, 32\)"),
        (deeper, rf"no weight for model\.layers\.{LAYERS}\."),
        (holed, "no file model-00002"),
        (tmp_path / "nothing", r"no config\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(path, tmp_path / "out")
        assert not (tmp_path / "out.filet-run").exists()


def test_arguments_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    no_labels = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}]
    for change, message in (
        ({"lora_config": lora(target_modules=["q_proj", "lm_head"])}, "lm_head: outside"),
        ({"lora_config": lora(r=33)}, "rank 33 exceeds"),
        ({"engine": "fast"}, "expected 'auto', 'memory' or 'blockwise'"),
        ({"host_memory": 0}, "host_memory=0"),
        ({"host_memory": 5}, "host_memory holds 0"),
        ({"output": tmp_path / "taken"}, "overwrite=True"),
        ({"output": tmp_path / "taken", "overwrite": True}, "replaces only adapters"),
        ({"batches": []}, "no sample"),
        ({"batches": no_labels}, "no labels"),
        ({"lora_config": lora(target_modules=["q_proj", "embed_tokens"])}, "embed_tokens: outside"),
        ({"lora_config": lora(modules_to_save=["lm_head"])}, r"modules_to_save=\['lm_head'\]: .*"),
        ({"lora_config": lora(trainable_token_indices=[1])}, "trainable_token_indices="),
        ({"lora_config": lora(bias="all")}, "bias='all': .* expected 'none'"),
        (
            {"lora_config": lora(init_lora_weights="pissa")},
            "has init_lora_weights=.pissa., by which PEFT changes the base weights; expected",
        ),
        (
            {"lora_config": lora(target_modules=["q_proj", "mlp.upproj"])},
            r"target_modules has 'mlp\.upproj' .* expected names like 'mlp\.up_proj'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(**{"folder": folder, "output": tmp_path / "out", **change})
        assert not (tmp_path / "out.filet-run").exists()


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_weights_that_the_model_does_not_use(engine: str, folder: Path, tmp_path: Path) -> None:
    """Named once and counted; the adapter is that of the model which config.json describes."""
    shallow = changed_config(folder, tmp_path / "shallow", num_hidden_layers=LAYERS - 1)
    said = rf"does not use, model\.layers\.{LAYERS - 1}\.\S+ and 8 more; expected a config\.json"
    with pytest.warns(UserWarning) as caught:
        report = initialize(shallow, tmp_path / "out", engine)
    warned = [str(each.message) for each in caught if "does not use" in str(each.message)]
    assert len(warned) == 1 and re.search(said, warned[0])
    assert not any(f"layers.{LAYERS - 1}." in name for name in report.modules)


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_nothing_is_said_of_folders_as_they_are_saved(
    engine: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of tied heads, bare models and experts that are saved one by one."""
    models.FIT["no head, tied"]().save_pretrained(tmp_path / "bare")
    tied = models.llama(tie_word_embeddings=True)
    state = {**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach().clone()}
    tied.save_pretrained(tmp_path / "tied")
    save_file(state, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    for path in (tmp_path / "bare", tmp_path / "tied", folders("gpt2"), smollm2.prepare()):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*does not use")
            if engine == "memory":
                load_model(path, device="cpu")
            else:
                ShardedWeights(path, empty_model(path))


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
@pytest.mark.parametrize("kind", models.UNFIT)
def test_folders_of_another_model(kind: str, engine: str, tmp_path: Path) -> None:
    """A head that transformers makes up, or a model that sees its labels: refused by its name."""
    make, said = models.UNFIT[kind]
    make().save_pretrained(tmp_path / "model")
    for _ in range(2):  # with the names of its classes, and without
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            initialize(tmp_path / "model", tmp_path / "out", engine)
        assert str(tmp_path / "model") in str(caught.value)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        if kind != "masked":
            break
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": []}))
        said = "attends both ways"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.filet-run").exists()


def test_a_bare_model_with_tied_embeddings(tmp_path: Path) -> None:
    """Nothing is missing: its head is its embedding."""
    models.FIT["no head, tied"]().save_pretrained(tmp_path / "model")
    for engine in ("memory", "blockwise"):
        initialize(tmp_path / "model", tmp_path / engine, engine)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


def test_a_folder_in_memory_lacks_no_weight(folder: Path, tmp_path: Path) -> None:
    """As in the blockwise engine; transformers would make the weight up."""
    deeper = changed_config(folder, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    wider = changed_config(folder, tmp_path / "wider", intermediate_size=50)
    for path, message in (
        (deeper, rf"no weight for model\.layers\.{LAYERS}\.\S+ and 8 more"),
        (wider, r"has shape \(32, 48\) .* expected \(32, 50\)"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(path, tmp_path / "out", "memory")


@pytest.mark.filterwarnings("ignore:.*keep PEFT's default")
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_what_is_left_to_peft_depends_on_the_seed_alone(
    engine: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Mixtral's routers and experts; the process's own random state is left alone."""
    path, data, found = folders("mixtral"), batches(), []  # both draw
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        output = tmp_path / str(number)
        initialize_folder(path, data, output, lora(), FiletConfig(seed=seed), engine=engine,
                          device="cpu", show_progress_bar=False)  # fmt: skip
        assert torch.equal(torch.get_rng_state(), before)
        weights = adapter(output)
        left = FiletReport.load(output).left_default
        found.append({key: value for key, value in weights.items() if "mlp" in key})
        assert left and found[-1]
    one, same, other = found
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_batches_that_are_refused(
    engine: str, folder: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    first, *_ = batches()
    wrong_id = {**first, "input_ids": first["input_ids"].clone()}
    wrong_id["input_ids"][1, -1] = models.VOCAB
    wrong_label = {**first, "labels": first["labels"].clone()}
    wrong_label["labels"][1, 1] = models.VOCAB
    long = {key: torch.ones(2, 17, dtype=torch.int64) for key in ("input_ids", "labels")}
    pairs = {f"chosen_{key}": value for key, value in first.items()}
    for path, given, kind, message in (
        (folder, [first, wrong_id], ValueError, r"input_ids of batch 1 has 29; expected 0 … 28"),
        (folder, [wrong_label], ValueError, r"labels of batch 0 has 29; expected -100, or"),
        (folders("gpt2"), [long], ValueError, r"17 tokens a sample; expected at most 16"),
        (folder, [pairs], ValueError, r"no input_ids in the keys of batch 0, chosen_input_ids"),
        (folder, models._text(1), ValueError, r"input_ids of batch 0 has shape \(5,\), as one"),
        (folder, models.loader(models._text(1)).dataset[0], TypeError, "batches is a dict"),
        (folder, [[first]], TypeError, "gave a list; expected a dict"),
    ):
        with pytest.raises(kind, match=message):
            initialize(path, tmp_path / "out", engine, batches=given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.filet-run").exists()


def test_items_counted_by_a_trainer_change_nothing(folder: Path, tmp_path: Path) -> None:
    counted = [batch | {"num_items_in_batch": torch.tensor(7)} for batch in batches()]
    for engine in ("memory", "blockwise"):
        plain = initialize(folder, tmp_path / f"{engine}-plain", engine)
        assert_equal(initialize(folder, tmp_path / engine, engine, batches=counted), plain, 0)


def test_experts_by_the_names_they_had(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT knows names of layers that transformers has fused since: they are no unknown ones."""
    names = ["q_proj", "w1", "w2", "w3"]
    with pytest.warns(UserWarning, match="keep PEFT's default"):
        report = initialize(
            folders("mixtral"), tmp_path / "out", lora_config=lora(target_modules=names)
        )
    assert [name.rpartition(".")[2] for name in report.modules] == ["q_proj"] * 2


def test_nan_names_the_module(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for shard in broken.glob("*.safetensors"):
        weights = load_file(shard)
        for name, value in weights.items():
            if name == "model.layers.3.mlp.down_proj.weight":
                value[0, 0] = torch.nan
        save_file(weights, shard, {"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"model\.layers\.4\..*has a NaN or infinity"):
        initialize(broken, tmp_path / "out")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.linear(hidden)


class _Inner(nn.Module):
    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(_Block() for _ in range(2))
        self.between = between

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return self.between(self.layers, self.embedding(input_ids))


class _Outer(nn.Module):
    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.model = _Inner(between)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class _Target:
    weight = torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda layers, x: layers[1](layers[0](x) * 2), r"output of one block .*\(at block 1\)"),
        (lambda layers, x: layers[1](layers[1](x)), r"output of one block .*\(at block 1\)"),
        (lambda layers, x: layers[0](x), "1 of the 2 blocks"),
        (lambda layers, x: layers[1](layers[0](x), x), "hidden states of another block"),
        (lambda layers, x: layers[1](layers[0](x), object()), "called with a object"),
        (lambda layers, x: layers[1](hidden=layers[0](x)), "no positional argument"),
        (lambda layers, x: (lambda y: layers[1](y[0], y[1]))(layers[0](x)), "takes more than"),
    ],
)
def test_models_whose_blocks_are_no_chain(between: Callable[..., Any], message: str) -> None:
    model = _Outer(between)
    parts = Parts(model, {"model.layers.0.linear": _Target()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        parts.capture({"input_ids": torch.zeros(3, 2, dtype=torch.int64)})
    assert all("forward" not in vars(block) for block in parts.blocks)


# Weights.


def test_weights_come_and_go(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_PIECE", 2**10)  # several for a weight
    monkeypatch.setattr(weights, "_SHARE", 2**8)  # several threads for a piece
    model = empty_model(folder)
    source = ShardedWeights(folder, model)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    groups = [[entry] for entry in entries(model)]
    stream = WeightStream(source, device)
    for index in stream.run(groups):
        for name in groups[index][0].names:
            assert torch.equal(model.state_dict()[name].cpu(), expected[name])
        here = {name for name, value in model.state_dict().items() if not value.is_meta}
        assert here == {*groups[index][0].names}
    assert all(value.is_meta for value in model.state_dict().values())
    with closing(stream.run(groups)) as loaded:
        next(loaded)  # an early end stops the thread
    assert all(value.is_meta for value in model.state_dict().values())


def test_the_next_sweep_loads_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's weights while the last block runs, the last block's while the head does."""
    asked: Counter[str] = Counter()  # since the sweeps began
    changed = threading.Condition()
    tensors = ShardedWeights.tensors

    def ask(self: ShardedWeights, wanted: Sequence[Entry]) -> Iterator[Any]:
        with changed:
            asked.update(name for entry in wanted for name in entry.names)
            changed.notify_all()
        return tensors(self, wanted)

    def wait_for(name: str, times: int) -> bool:
        with changed:
            return changed.wait_for(lambda: asked[name] >= times, timeout=10)

    in_time: dict[str, bool] = {}
    forward, run_forward = Blockwise._forward, Blockwise._run_forward
    gradient = Blockwise._loss_gradient

    def start(self: Blockwise, arena: Any, blocks: range, then: Any) -> Any:
        asked.clear()
        in_time["started"] = True
        return forward(self, arena, blocks, then)

    def last_block(self: Blockwise, block: int, *args: Any) -> Any:
        if block == self.number - 1:
            in_time["head"] = wait_for("lm_head.weight", 1)
        return run_forward(self, block, *args)

    def head(self: Blockwise, *args: Any) -> Tensor:
        if "started" in in_time and "block" not in in_time:
            # The forward sweep asked for it as well.
            name = f"model.layers.{self.number - 1}.mlp.up_proj.weight"
            in_time["block"] = wait_for(name, 2)
        return gradient(self, *args)

    monkeypatch.setattr(ShardedWeights, "tensors", ask)
    for name, function in (("_forward", start), ("_run_forward", last_block)):
        monkeypatch.setattr(Blockwise, name, function)
    monkeypatch.setattr(Blockwise, "_loss_gradient", head)
    initialize(folder, tmp_path / "adapter")
    assert in_time == {"started": True, "head": True, "block": True}


@pytest.mark.parametrize("share", [100, 2**20])
def test_parts_of_a_weight(share: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SHARE", share)
    model = empty_model(folder)
    source = ShardedWeights(folder, model)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for entry, stored in source.tensors(entries(model)):
        assert isinstance(stored, weights.Stored)
        whole = expected[entry.names[0]].flatten()
        for start in (0, whole.numel() // 3):
            for dtype in (torch.float32, torch.bfloat16):
                goal = torch.empty(whole.numel() - start - 5, dtype=dtype)
                stored.read(start, goal)
                assert torch.equal(goal, whole[start : start + goal.numel()].to(dtype))


def test_a_shard_that_has_become_shorter(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model = empty_model(tmp_path / "model")
    source = ShardedWeights(tmp_path / "model", model)
    shard = source.files[-1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{shard.name} ends at \d+ bytes"):
        next(WeightStream(source, torch.device("cpu")).run([entries(model)]))


def test_an_error_of_the_loading_thread_arrives(folder: Path) -> None:
    model = empty_model(folder)

    class Broken:
        def tensors(self, wanted: Any) -> Iterator[Any]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def identity(self) -> dict[str, Any]:
            return {}

    with pytest.raises(OSError, match="Input/output error"):
        next(WeightStream(Broken(), torch.device("cpu")).run([entries(model)]))


# The command line.


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    words = Tokenizer(kinds.WordLevel({f"w{n}": n for n in range(models.VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(model)
    data = tmp_path / "data.txt"
    data.write_text("\n".join(" ".join(f"w{(n * k) % 29}" for k in range(3, 9)) for n in range(9)))
    init = ["init", "--model", model, "--data", data, "--rank", 4, "--device", "cpu",
            "--batch-size", 4]  # fmt: skip

    def run(*more: Any) -> int:
        return main([str(each) for each in (*init, *more)])

    assert run("--output", tmp_path / "memory", "--engine", "memory", "--no-progress") == 0
    blocks = ("--engine", "blockwise", "--host-memory", "64M", "--scratch", tmp_path / "scratch")
    assert run("--output", tmp_path / "blocks", *blocks) == 0
    assert "plan " in capsys.readouterr().err
    assert_same_adapter(tmp_path / "blocks", tmp_path / "memory")
    assert run("--output", tmp_path / "blocks", *blocks) == 1  # there already
    assert run("--output", tmp_path / "blocks", *blocks, "--overwrite", "--no-progress") == 0
    for wrong in (
        ("--engine", "blockwise", "--save-statistics", tmp_path / "s.safetensors"),
        ("--engine", "memory", "--scratch", tmp_path),
        ("--host-memory", "much"),
    ):
        with pytest.raises(SystemExit) as exit:
            run("--output", tmp_path / "no", *wrong)
        assert exit.value.code == 2
