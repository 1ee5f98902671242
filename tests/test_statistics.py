"""Statistics: to a file and back, merged, applied without the model's run, refused elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from disk import files_up_to
from filet import FiletConfig, Statistics, apply_statistics, collect_statistics
from filet.model.fingerprint import fingerprints
from filet_kernels import Moments, fisher_energies
from models import (
    LENGTHS,
    Case,
    assert_energies,
    case,
    llama,
    loader,
    peft_of,
    randomised,
    truth,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def collected(peft_model: PeftModel, batches: Any, **config: Any) -> Statistics:
    return collect_statistics(
        peft_model, batches, FiletConfig(**{"samples": None, **config}), show_progress_bar=False
    )


def energies(statistics: Statistics, case_: Case) -> dict[str, Tensor]:
    return {
        name: fisher_energies(weight_of(case_.model, name).to(m.loss_terms.device), m).cpu()
        for name, m in statistics.moments.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "experts"])
def test_save_and_load(kind: str, tmp_path: Path, device: torch.device) -> None:
    c = case(kind)
    taken = collected(peft_of(c, device), loader(c.samples, 1))
    path = tmp_path / "new folder" / "statistics.safetensors"
    taken.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = Statistics.load(path)
    ours, theirs = energies(taken, c), energies(loaded, c)
    assert list(loaded.moments) == list(taken.moments)
    for name in ours:
        # On a GPU in float32's precision, while what was loaded is on the CPU.
        assert torch.allclose(
            ours[name], theirs[name], rtol=0 if device.type == "cpu" else 1e-4, atol=0
        )
        for side in ("input", "output"):
            one, two = (getattr(s.moments[name], side) for s in (taken, loaded))
            assert one.space == two.space and int(one.count) == int(two.count)
            assert torch.equal(one.sum.tril().cpu(), two.sum)
    for key in (
        "samples",
        "tokens",
        "loss_terms",
        "data",
        "fisher",
        "shared_input",
        "fingerprints",
    ):
        assert getattr(taken, key) == getattr(loaded, key), key
    for follower, leader in loaded.shared_input.items():
        assert loaded.moments[follower].input is loaded.moments[leader].input
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert Statistics.load(again).fingerprints == taken.fingerprints


def test_shared_moments_are_stored_once(tmp_path: Path) -> None:
    c = case("llama")
    sizes = {}
    for share in (True, False):
        path = tmp_path / f"{share}.safetensors"
        collected(peft_of(c), loader(c.samples), share_inputs=share).save(path)
        with safe_open(path, framework="pt") as file:
            sizes[share] = sum(".sum" in key for key in file.keys())
    assert sizes == {True: 14 + 8, False: 14 + 14}


def test_halves_merge_to_the_whole(tmp_path: Path) -> None:
    c = case("llama")
    whole = collected(peft_of(c), loader(c.samples))
    halves = [collected(peft_of(c), loader(part)) for part in (c.samples[:5], c.samples[5:])]
    halves[1].save(tmp_path / "half")
    merged = halves[0].merge(Statistics.load(tmp_path / "half"))
    assert_energies(energies(merged, c), energies(whole, c), 1e-5)
    assert_energies(energies(merged, c), truth("llama"), 1e-4)
    for key in (
        "samples",
        "tokens",
        "loss_terms",
        "data",
        "fisher",
        "shared_input",
        "fingerprints",
    ):
        assert getattr(merged, key) == getattr(whole, key), key
    assert merged.seconds == halves[0].seconds + halves[1].seconds
    merged.save(tmp_path / "merged")
    loaded = Statistics.load(tmp_path / "merged")
    assert loaded.moments[c.targets[1]].input is loaded.moments[c.targets[0]].input
    # The halves are what they were.
    assert_energies(
        energies(halves[0], c), energies(collected(peft_of(c), loader(c.samples[:5])), c), 0
    )


def test_merge_where_a_half_reached_only_some_experts() -> None:
    c = case("experts")
    only = [s for s in c.samples if not (s["input_ids"] % 3 == 1).any()] or [
        s | {"input_ids": s["input_ids"] // 3 * 3} for s in c.samples[:4]
    ]
    one, two = collected(peft_of(c), loader(only, 1)), collected(peft_of(c), loader(c.samples, 1))
    assert not int(one.moments["experts.1.0"].input.count)
    whole = collected(peft_of(c), loader([*only, *c.samples], 1))
    for merged in (one.merge(two), two.merge(one)):
        seen = {n: e for n, e in energies(whole, c).items() if "experts.3" not in n}
        found = {n: e for n, e in energies(merged, c).items() if "experts.3" not in n}
        assert_energies(found, seen, 1e-5)


def test_merge_is_refused() -> None:
    c = case("llama")
    mine = collected(peft_of(c), loader(c.samples[:2]))
    with pytest.raises(ValueError, match="cannot merge fisher='sampled'"):
        mine.merge(collected(peft_of(c), loader(c.samples[:2]), fisher="sampled"))
    other = copy.deepcopy(c.model)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        other.get_submodule(name).weight[3, 5] += 1
    theirs = collected(peft_of(Case(other, c.samples, c.targets)), loader(c.samples[:2]))
    with pytest.raises(
        ValueError, match=f"another base model: the weight of {name} is float32:48x32:"
    ):
        mine.merge(theirs)
    fewer = collected(peft_of(Case(c.model, c.samples, c.targets[:3])), loader(c.samples[:2]))
    with pytest.raises(ValueError, match=f"no module {c.targets[3]!r}"):
        mine.merge(fewer)
    with pytest.raises(ValueError, match=f"no module {c.targets[3]!r}"):
        fewer.merge(mine)


def test_applied_to_other_ranks_and_targets_without_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device
) -> None:
    c = case("llama")
    path = tmp_path / "statistics"
    collected(peft_of(c, device), loader(c.samples)).save(path)
    statistics = Statistics.load(path)
    part = [t for t in c.targets if t.endswith(("q_proj", "down_proj"))]
    peft_model = peft_of(Case(c.model, c.samples, part), device, r=9)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    for module in peft_model.modules():
        monkeypatch.setattr(module, "forward", run)
    report = apply_statistics(peft_model, statistics, FiletConfig(select="max"))
    assert list(report.modules) == part
    for name, module in report.modules.items():
        order = torch.argsort(truth("llama")[name], descending=True, stable=True)
        assert torch.equal(module.indices, order[:9])
    assert report.samples == len(LENGTHS) and report.config["fisher"] == "empirical"


def test_fisher_in_the_report_is_the_statistics_own() -> None:
    c = case("llama")
    statistics = collected(peft_of(c), loader(c.samples), fisher="sampled")
    assert apply_statistics(peft_of(c), statistics).config["fisher"] == "sampled"


def test_settings_in_the_report_are_the_statistics_own(tmp_path: Path) -> None:
    c = case("llama")
    batches = list(loader(c.samples, 3))
    config = FiletConfig(samples=6, token_mask=None, share_inputs=False, loss_reduction="mean")
    taken = collect_statistics(peft_of(c), batches, config, show_progress_bar=False)
    taken.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    said = apply_statistics(peft_of(c), loaded, FiletConfig(gamma=1.0, seed=3)).config
    mine = {"gamma": 1.0, "seed": 3, "select": "min"}
    assert said == {**dataclasses.asdict(config), **mine}
    # Of two passes only what both had; a file that does not say leaves out what it cannot know.
    other = dataclasses.replace(config, token_mask="attention_mask")
    more = collect_statistics(peft_of(c), batches, other, show_progress_bar=False)
    both = apply_statistics(peft_of(c), taken.merge(more)).config
    assert said.keys() - both.keys() == {"token_mask", "samples"} and not both["share_inputs"]
    unknown = apply_statistics(peft_of(c), dataclasses.replace(taken, settings={})).config
    assert said.keys() - unknown.keys() == taken.settings.keys() != set()


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    c = case("llama")
    path = tmp_path / "mine.safetensors"
    collected(peft_of(c), loader(c.samples[:2])).save(path)
    statistics = Statistics.load(path)

    def refused(model: Any, match: str, **lora: Any) -> None:
        peft_model = peft_of(Case(model, c.samples, c.targets), **lora)
        before = {n: p.detach().clone() for n, p in peft_model.named_parameters()}
        with pytest.raises(ValueError, match=match):
            apply_statistics(peft_model, statistics)
        for name, parameter in peft_model.named_parameters():
            assert torch.equal(parameter, before[name])

    # One bit of one weight: the smallest difference there is.
    changed = copy.deepcopy(c.model)
    name = "model.layers.1.self_attn.v_proj"
    weight = changed.get_submodule(name).weight
    with torch.no_grad():
        weight.view(torch.int32)[7, 3] ^= 1
    refused(changed, f"{path} belong to another base model: the weight of {name} is float32:16x32:")
    wider = llama(intermediate_size=56)
    for target in c.targets:
        if "mlp" not in target:
            wider.get_submodule(target).load_state_dict(c.model.get_submodule(target).state_dict())
    refused(wider, r"0\.mlp\.gate_proj is float32:48x32:\w+ there and float32:56x32:\w+ in this")
    refused(copy.deepcopy(c.model).bfloat16().float(), r"0\.self_attn\.q_proj is")
    deeper = llama(layers=3)
    peft_model = peft_of(Case(deeper, c.samples, ["q_proj"]))
    deeper_name = "model.layers.2.self_attn.q_proj"
    with pytest.raises(ValueError, match=f"have no module '{deeper_name}', a target of"):
        apply_statistics(peft_model, statistics)


def test_another_dtype_is_said_to_be_one() -> None:
    """Which it is, which was expected and how to get it; in a merge too."""
    c = case("llama")
    statistics = collected(peft_of(c), loader(c.samples[:2]))
    other = peft_of(c, dtype=torch.bfloat16)
    message = (
        r"^the statistics belong to a base model in float32: the weight of "
        r"model\.layers\.0\.self_attn\.q_proj is bfloat16 in {}; expected float32: load the model "
        r"with dtype=torch\.float32 \(--dtype float32\)$"
    )
    with pytest.raises(ValueError, match=message.format("this model")):
        apply_statistics(other, statistics)
    with pytest.raises(ValueError, match=message.format("the other statistics")):
        statistics.merge(collected(other, loader(c.samples[:2])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [21, 24])
def test_fingerprint(n: int, dtype: torch.dtype, device: torch.device) -> None:
    def fingerprint(weight: torch.Tensor) -> str:
        return fingerprints({"other": torch.ones(3, 5, device=device), "this": weight})["this"]

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(37, n, generator=generator).to(dtype)
    mine = fingerprint(W)
    shifted = torch.cat([W.new_ones(1), W.flatten()])[1:].view(37, n)  # not aligned to 8 bytes
    assert fingerprint(shifted.to(device)) == mine
    assert fingerprint(W.to(device)) == mine
    assert fingerprint(W.T.contiguous().T) == mine  # strides do not matter, as in Conv1D
    assert fingerprint(W.T) != mine
    for change in (W.flip(0), W.flip(1), W.roll(1, 0), W.roll(1, 1), -W, torch.zeros_like(W)):
        assert fingerprint(change) != mine
    for row, column in ((0, 0), (36, n - 1), (17, 3)):
        other = W.clone()
        other[row, column] = torch.nextafter(other[row, column].float(), torch.tensor(1e9)).to(
            dtype
        )
        if other[row, column] == W[row, column]:  # float32's next number is none of this dtype
            other[row, column] *= 2
        assert fingerprint(other) != mine
    assert (
        len({fingerprint(torch.zeros(a, b, dtype=dtype)) for a, b in ((2, 3), (3, 2), (6, 1))}) == 3
    )


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    c = case("llama")
    statistics = collected(peft_of(c), loader(c.samples[:2]))
    path = tmp_path / "statistics.safetensors"
    with files_up_to(20_000), pytest.raises(OSError, match="File too large"):
        statistics.save(path)
    assert list(tmp_path.iterdir()) == []
    statistics.save(path)
    content = path.read_bytes()
    with files_up_to(20_000), pytest.raises(OSError, match="File too large"):
        statistics.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content, "the file that was there before is still whole"


class Alive(TorchDispatchMode):
    """Inside: the most bytes that tensors which operations made have held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            # What lies where an argument lies, a view, is none of its own.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in mine:
                self.made.append(weakref.ref(tensor))
        alive = [tensor for made in self.made if (tensor := made()) is not None]
        self.most = max(self.most, sum(tensor.untyped_storage().nbytes() for tensor in alive))
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saving_copies_one_moment_at_a_time(
    dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    """None on the GPU, and one in host memory; the file is what the library would have written."""
    generator = torch.Generator().manual_seed(0)
    moments: dict[str, Moments] = {}
    for name in ("a", "b", "c", "d"):
        shared = moments["a"].input if name == "b" else None
        moments[name] = Moments.zeros((384, 256), dtype=dtype, device=device, input=shared)
    sums = {id(side): side.sum for m in moments.values() for side in (m.input, m.output)}
    for each in sums.values():
        each.copy_(torch.randn(256, 256, generator=generator, dtype=dtype))
    taken = Statistics(moments, dict.fromkeys(moments, "hash"), {"b": "a"}, 1, 2, 3, "empirical")
    one = 256 * 256 * dtype.itemsize
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    tracemalloc.start()
    try:
        with Alive() as alive:
            taken.save(tmp_path / "ours")
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert one <= alive.most + python < 2 * one
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated(device) == before
    with safe_open(tmp_path / "ours", framework="pt") as file:
        metadata = file.metadata()
    tensors = {}
    for name, module in json.loads(metadata["statistics"])["modules"].items():
        for side in ("input", "output"):
            moment = getattr(taken.moments[name], side)
            tensors[f"{module[side]}.sum"] = moment.sum.tril().cpu()
            tensors[f"{module[side]}.count"] = moment.count.cpu()
    save_file(tensors, tmp_path / "theirs", metadata)
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(sums)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def test_wrong_files(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("This is no safetensors file, but it is long enough to look like one.")
    with pytest.raises(ValueError, match="text is not a readable safetensors file"):
        Statistics.load(text)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match="empty is not a readable safetensors file"):
        Statistics.load(empty)
    other = tmp_path / "other"
    save_file({"a": torch.ones(2)}, other)
    with pytest.raises(ValueError, match="other: format None; expected 'filet-statistics-1'"):
        Statistics.load(other)
    with pytest.raises(FileNotFoundError, match="absent"):
        Statistics.load(tmp_path / "absent")
    # Cut short, as by a copy that was interrupted.
    c = case("llama")
    cut = tmp_path / "cut"
    collected(peft_of(c), loader(c.samples[:2])).save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut is not a readable safetensors file"):
        Statistics.load(cut)


def test_statistics_belong_to_the_base_not_to_the_adapter() -> None:
    """Another adapter of the same base, trained or not, takes them as they are."""
    c = case("llama")
    statistics = collected(peft_of(c), loader(c.samples))
    peft_model = peft_of(c, r=2)
    peft_model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    report = apply_statistics(peft_model, statistics, None, "other")
    assert [m.rank for m in report.modules.values()] == [3, 3]
    randomised(peft_model.base_model.model, seed=1)
    with pytest.raises(ValueError, match="another base model"):
        apply_statistics(peft_model, statistics, None, "other")
