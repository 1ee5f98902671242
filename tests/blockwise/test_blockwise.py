"""The blockwise engine, block by block from a folder, against the one that holds the whole model.

On a CPU both run the very same operations in the same order, in float32 and bfloat16, so their
energies are equal to the bit here; the tolerances below are what is asked of them anywhere.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    MARKS,
    MODELS,
    adapter,
    assert_equal,
    assert_same_adapter,
    batches,
    initialize,
    lora,
    model_folder,
    run_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import filet
import models
import smollm2
from filet import FiletConfig, FiletReport
from filet.blockwise import folder as folder_module
from filet.blockwise.engine import Blockwise
from filet.blockwise.folder import empty_model
from filet.cli.main import main
from filet.collect import hooks, unrounded
from filet.initialize import initialize_folder
from oldest_peft import needs

pytestmark = MARKS


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*keep PEFT's default")
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_engine_in_memory(kind: str, tmp_path: Path, device: torch.device) -> None:
    reports = {
        engine: initialize(model_folder(kind), tmp_path / engine, engine, device=device)
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
        {"start": "untouched", "select": "max", "scaling": "singular", "samples": 7},
        {"start": "untouched", "normalization": "sum", "share_inputs": False},
        {"normalization": "mean", "share_inputs": False},
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


def test_items_counted_by_a_trainer_change_nothing(folder: Path, tmp_path: Path) -> None:
    counted = [batch | {"num_items_in_batch": torch.tensor(7)} for batch in batches()]
    for engine in ("memory", "blockwise"):
        plain = initialize(folder, tmp_path / f"{engine}-plain", engine)
        assert_equal(initialize(folder, tmp_path / engine, engine, batches=counted), plain, 0)


@pytest.mark.filterwarnings("ignore:.*keep PEFT's default")
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_what_is_left_to_peft_depends_on_the_seed_alone(engine: Any, tmp_path: Path) -> None:
    """Mixtral's routers and experts; the process's own random state is left alone."""
    needs("0.20", "leaves them out of all-linear, or fails at it")
    path, data, found = model_folder("mixtral"), batches(), []  # both draw
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


def test_a_bare_model_with_tied_embeddings(tmp_path: Path) -> None:
    """Nothing is missing: its head is its embedding."""
    models.FIT["no head, tied"]().save_pretrained(tmp_path / "model")
    for engine in ("memory", "blockwise"):
        initialize(tmp_path / "model", tmp_path / engine, engine)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, also where hooks form the output of o_proj (32 of 64) as they do on a GPU.

    They do it in an order of their own, which is played here by two bits that are off.
    """
    monkeypatch.setattr(unrounded, "HANDS_ON", {"cpu"} if handed_on else set())
    plain = unrounded.unrounded
    monkeypatch.setattr(hooks, "unrounded", lambda *args: plain(*args) * (1 + 2**-6))
    folder = model_folder("qwen3_moe")
    seen: dict[tuple[str, bool], list[Tensor]] = {}
    model = empty_model(folder, dtype=torch.bfloat16)

    def note(name: str, output: tuple[Tensor, ...]) -> None:
        if run.plan is not None:  # after the rehearsal
            numbers = torch.cat([each.detach().float().flatten() for each in output])
            seen.setdefault((name, torch.is_grad_enabled()), []).append(numbers)

    with run_of(folder, tmp_path, model=model) as run:
        for name, module in run.model.base.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda module, args, output, name=name: note(name, output)
                )
        run.sweep()
    names = {name for name, _ in seen}
    assert len(names) == models.SMALL["num_hidden_layers"]
    for name in names:
        forward, recomputed = seen[name, False], seen[name, True]
        assert len(forward) == len(recomputed) == len(batches())
        assert all(map(torch.equal, forward, recomputed))


# The output.


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_the_folder_is_what_save_as_lora_writes(
    start: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with its picture
    config = FiletConfig(start=start)
    report = initialize(folder, tmp_path / "memory", "memory", config=config)
    initialize(folder, tmp_path / "blockwise", config=config)
    assert_same_adapter(tmp_path / "blockwise", tmp_path / "memory")
    described = ["filet.json"] if start == "untouched" else []
    for name in ("adapter_config.json", *described):
        mine, theirs = (
            json.loads((tmp_path / engine / name).read_text()) for engine in ("blockwise", "memory")
        )
        assert mine == theirs, name
    saved = FiletReport.load(tmp_path / "blockwise")
    assert_equal(saved, report, 1e-5)
    files = {path.name for path in (tmp_path / "blockwise").iterdir()}
    assert files == {path.name for path in (tmp_path / "memory").iterdir()}
    assert ("filet.json" in files) == (start == "untouched")
    assert not (tmp_path / "blockwise.filet-run").exists()

    model = filet.load(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "blockwise")
    batch = {key: value for key, value in batches()[0].items() if key != "labels"}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


def test_loaded_onto_another_dtype(folder: Path, tmp_path: Path) -> None:
    """The same weights, and not: what to load them as is said."""
    initialize(folder, tmp_path / "out", "memory", config=FiletConfig(start="untouched"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    message = (
        rf"^{tmp_path / 'out'} belongs to a base model in float32: the weight of model\.layers\.0\."
        r"self_attn\.q_proj is bfloat16 in this model; expected float32: .*dtype=torch\.float32"
    )
    with pytest.raises(ValueError, match=message):
        filet.load(base, tmp_path / "out")


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
        ("--engine", "memory", "--scratch", tmp_path),
        ("--host-memory", "much"),
    ):
        with pytest.raises(SystemExit) as exit:
            run("--output", tmp_path / "no", *wrong)
        assert exit.value.code == 2
