"""The plan before a pass, moments in several passes, and memory that runs out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import filet
from filet import FiletConfig, OutOfMemoryError, Statistics, collect_statistics
from filet.collect import estimate as plan_module
from filet.collect import groups as passes_module
from filet.collect import probe
from filet.collect.batches import Batches
from filet.collect.groups import groups
from filet.model.blocks import blocks
from filet.model.targets import find_targets
from filet.system.text import readable
from models import KINDS, LENGTHS, Case, case, llama, loader, peft_of

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30


def collected(peft_model: Any, batches: Any, c: Case, **config: Any) -> Statistics:
    return collect_statistics(
        peft_model,
        batches,
        FiletConfig(**{"samples": None, **config}),
        forward_fn=c.forward_fn,
        show_progress_bar=False,
    )


def sides(statistics: Statistics) -> dict[str, tuple[Any, Any]]:
    return {name: (m.input, m.output) for name, m in statistics.moments.items()}


def assert_bitwise(found: Statistics, expected: Statistics) -> None:
    assert found.moments.keys() == expected.moments.keys()
    assert found.shared_input == expected.shared_input
    assert (found.samples, found.tokens, found.loss_terms) == (
        expected.samples,
        expected.tokens,
        expected.loss_terms,
    )
    for name, pair in sides(found).items():
        for one, other in zip(pair, sides(expected)[name], strict=True):
            assert (one.space, int(one.count)) == (other.space, int(other.count)), name
            assert torch.equal(one.sum.tril().cpu(), other.sum.tril().cpu()), name
        assert int(found.moments[name].loss_terms) == found.loss_terms
    for follower, leader in found.shared_input.items():
        assert found.moments[follower].input is found.moments[leader].input


def traces(peft_model: Any) -> Any:
    """What a pass or a plan has to leave as it was."""
    base = peft_model.base_model.model
    return (
        [module.training for module in peft_model.modules()],
        [parameter.requires_grad for parameter in peft_model.parameters()],
        [parameter.detach().clone() for parameter in peft_model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()],
        [name for name, module in base.named_modules() if "forward" in vars(module)],
        torch.get_rng_state(),
    )


def assert_untouched(peft_model: Any, before: Any) -> None:
    for now, then in zip(traces(peft_model), before, strict=True):
        if isinstance(now, Tensor):
            assert torch.equal(now, then)
        else:
            for a, b in zip(now, then, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# The plan.


@pytest.mark.parametrize(
    ("kind", "share"), [*((kind, True) for kind in KINDS), ("llama", False)], ids=str
)
def test_moments_are_predicted_to_the_byte(kind: str, share: bool, device: torch.device) -> None:
    c = case(kind)
    peft_model = peft_of(c, device)
    batch = next(iter(loader(c.samples)))
    before = traces(peft_model)
    config = FiletConfig(samples=None, share_inputs=share)
    plan = filet.estimate(peft_model, batch, config, forward_fn=c.forward_fn)
    assert_untouched(peft_model, before)
    statistics = collected(peft_model, loader(c.samples), c, share_inputs=share)
    assert plan.shared_input == statistics.shared_input
    for name, (one, other) in sides(statistics).items():
        shared = name in statistics.shared_input
        assert plan.moments[name] == (0 if shared else one.sum.nbytes, other.sum.nbytes)
    unique = {id(side): side.sum.nbytes for pair in sides(statistics).values() for side in pair}
    [on] = plan.devices
    assert on.moments == on.moments_at_a_time[1] == sum(unique.values())
    tensors = {id(t): t.nbytes for t in (*peft_model.parameters(), *peft_model.buffers())}
    assert on.weights == sum(tensors.values())


def test_moments_of_y_are_not_shared() -> None:
    """k and v take the same x, but each has a moment of its own smaller output."""
    c = case("llama")
    peft_model = peft_of(c, target_modules=["k_proj", "v_proj"])
    plan = filet.estimate(peft_model, next(iter(loader(c.samples))))
    statistics = collected(peft_model, loader(c.samples), c)
    assert plan.shared_input == statistics.shared_input == {}
    assert set(plan.moments.values()) == {(4 * 16**2, 4 * 16**2)}


def test_a_plan_in_words() -> None:
    c = case("llama")
    batch = next(iter(loader(c.samples)))
    plan = filet.estimate(peft_of(c), batch, FiletConfig(samples=12), tokens=100)
    assert (plan.length, plan.samples, plan.tokens, plan.passes) == (max(LENGTHS[:4]), 12, 100, 1)
    assert plan.fits and plan.advice == ""
    assert plan.seconds is not None and plan.seconds > 0
    lines = dict(line.split(maxsplit=1) for line in str(plan).splitlines())
    assert lines["data"] == "12 samples, 100 tokens"
    assert lines["batches"] == "of 12 samples x 9 tokens"
    assert lines["moments"] == readable(plan.devices[0].moments)
    assert lines["time"].startswith("about") and "estimated" in lines["time"]


def test_a_batch_on_a_cpu_has_4096_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    batch = next(iter(loader(c.samples)))
    peft_model = peft_of(c)
    whole = FiletConfig(samples=None)
    assert filet.estimate(peft_model, batch, whole).batch_size == 4096 // 9
    assert filet.estimate(peft_model, batch, whole, batch_size=3).batch_size == 3
    assert filet.estimate(peft_model, batch, FiletConfig(samples=5)).batch_size == 5
    assert filet.estimate(peft_model, batch, whole).seconds is None  # nobody knows how much
    monkeypatch.setattr(plan_module, "CPU_TOKENS", 20)
    assert filet.estimate(peft_model, batch, whole).batch_size == 2


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all"])
def test_arguments(value: Any) -> None:
    c = case("llama")
    batch = next(iter(loader(c.samples)))
    with pytest.raises(ValueError, match=r"batch_size=.*expected an integer"):
        filet.estimate(peft_of(c), batch, batch_size=value)
    with pytest.raises(ValueError, match=r"passes=.*expected an integer"):
        FiletConfig(passes=value)


class FakeGpu:
    """torch.cuda's memory functions for a model on the CPU that needs fixed + samples · each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peft_model: Any, free: int) -> None:
        self.fixed, self.each, self.free, self.total, self.share = 5000, 3000, free, 0, 1.0
        self.used = self.peak = 700  # before anything runs
        self.sizes: list[int] = []
        monkeypatch.setattr(plan_module, "gpus_of", lambda model: [torch.device("cpu")])
        monkeypatch.setattr(plan_module, "available", lambda device: self.free)
        for name, function in {
            "memory_allocated": lambda device: self.used,
            "max_memory_allocated": lambda device: self.peak,
            "mem_get_info": lambda device: (self.free, self.total),
            "get_per_process_memory_fraction": lambda device: self.share,
            "synchronize": lambda device: None,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.used),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        peft_model.base_model.model.register_forward_pre_hook(self.run, with_kwargs=True)

    def run(self, module: Any, args: Any, kwargs: Any) -> None:
        size = kwargs["input_ids"].shape[0]
        self.sizes.append(size)
        self.peak = max(self.peak, self.used + self.fixed + size * self.each)


def test_the_largest_batch_that_fits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    peft_model = peft_of(c)
    gpu = FakeGpu(monkeypatch, peft_model, free=10**9)
    monkeypatch.setattr(plan_module, "selection_bytes", lambda *_: 0)
    batch = next(iter(loader(c.samples)))
    whole = FiletConfig(samples=None)
    plan = filet.estimate(peft_model, batch, whole)
    assert gpu.sizes == [1, 2]
    [on] = plan.devices
    # 9 tokens, and y or h of 32 numbers: float32 and a float32 or float16 beside it.
    each = gpu.each + 9 * 8 * 32
    assert (on.fixed, on.per_sample, on.free) == (gpu.fixed, each, gpu.free)
    assert plan.batch_size == 16384 // 9
    gpu.free = on.moments + gpu.fixed + 250 * each + each - 1
    plan = filet.estimate(peft_model, batch, whole)
    assert (plan.batch_size, plan.passes, plan.fits) == (250, 1, True)
    assert not filet.estimate(peft_model, batch, whole, batch_size=1000).fits
    # Where a batch would have too few tokens, two passes are better.
    few = plan_module.FEW_TOKENS // 9
    gpu.free = on.moments + gpu.fixed + few * each
    plan = filet.estimate(peft_model, batch, whole)
    many = few + on.moments // 2 // each
    assert (plan.batch_size, plan.passes, plan.fits) == (many, 2, True)
    assert f"{readable(on.moments // 2)} at a time" in str(plan)
    assert filet.estimate(peft_model, batch, FiletConfig(samples=None, passes=1)).passes == 1
    gpu.free = on.moments + gpu.fixed + 3 * each  # not in any number of passes: the fewest
    plan = filet.estimate(peft_model, batch, whole)
    assert plan.passes == 1 and plan.batch_size == 3
    gpu.free = 100
    plan = filet.estimate(peft_model, batch, whole)
    assert (plan.batch_size, plan.fits) == (1, False)
    for words in (
        "--max-length",
        "gradient checkpointing",
        "target modules",
        "passes=N",
        "too large",
    ):
        assert words in plan.advice and words in str(plan)


def test_selection_and_reserve_count(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    peft_model = peft_of(c)
    batch = next(iter(loader(c.samples)))
    gpu = FakeGpu(monkeypatch, peft_model, free=10**9)
    [on] = filet.estimate(peft_model, batch).devices
    assert on.needed(0, 1) == on.moments + on.selection  # the larger one, of models this small
    gpu.total = 10**9
    [less] = filet.estimate(peft_model, batch).devices
    assert less.free == 10**9 * 96 // 100 and on.free == 10**9
    gpu.share = 0.5  # torch.cuda.set_per_process_memory_fraction: the rest is not ours to reserve
    [half] = filet.estimate(peft_model, batch).devices
    assert half.free == 10**9 * 98 // 100 and half.total == 10**9 // 2


def test_memory_of_one_sample_where_two_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    peft_model = peft_of(c)
    batch = next(iter(loader(c.samples)))
    gpu = FakeGpu(monkeypatch, peft_model, free=10**9)

    def full(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    peft_model.base_model.model.register_forward_pre_hook(full, with_kwargs=True)
    [on] = filet.estimate(peft_model, batch).devices
    assert on.fixed == 0 and on.per_sample == gpu.fixed + gpu.each + 9 * 8 * 32


def test_a_compiled_model_is_measured_in_the_shape_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of samples would compile it again."""
    c = case("llama")
    peft_model = peft_of(c)
    gpu = FakeGpu(monkeypatch, peft_model, free=10**9)
    assert not probe.is_compiled(peft_model)
    peft_model.base_model.model.model.layers[0].compile()  # when it is called, which is not now
    assert probe.is_compiled(peft_model)
    peft_model.base_model.model.model.layers[0]._compiled_call_impl = None
    monkeypatch.setattr(probe, "is_compiled", lambda model: True)
    [on] = filet.estimate(peft_model, next(iter(loader(c.samples)))).devices
    assert gpu.sizes == [4, 4]
    assert on.fixed == 0 and on.per_sample == (gpu.fixed + 4 * gpu.each) // 4 + 9 * 8 * 32


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "0.977 KiB"), (2**21, "2 MiB"),
     (19.6 * GIB, "19.6 GiB"), (750 * GIB, "750 GiB")],
)  # fmt: skip
def test_bytes_are_readable(size: float, text: str) -> None:
    assert readable(size) == text


# Several passes.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert masked", "perceptron", "experts"])
def test_passes_change_nothing(kind: str) -> None:
    """Bitwise, also with shared inputs, padding, and an expert that sees nothing."""
    c = case(kind)
    batch_size = 1 if kind == "experts" else 4
    one = collected(peft_of(c), loader(c.samples, batch_size), c, passes=1)
    peft_model = peft_of(c)
    before = traces(peft_model)

    def once() -> Iterator[Any]:
        """A generator, which fills the same memory again for every batch."""
        memory: dict[str, Tensor] = {}
        for batch in batches:
            for key, value in batch.items():
                room = memory.setdefault(key, torch.empty(1000, dtype=value.dtype))
                batch[key] = room[: value.numel()].view(value.shape).copy_(value)
            yield batch

    batches = [dict(batch) for batch in loader(c.samples, batch_size)]
    before = traces(peft_model)
    assert_bitwise(collected(peft_model, once(), c, passes=7), one)
    assert_untouched(peft_model, before)


def test_batches_are_read_once_and_no_further_than_asked() -> None:
    c = case("llama")

    def once() -> Iterator[Any]:
        yield from itertools.islice(loader(c.samples, 3), 2)
        raise AssertionError("read past the samples asked for")

    found = collected(peft_of(c), once(), c, passes=2, samples=5)
    assert_bitwise(found, collected(peft_of(c), loader(c.samples, 3), c, passes=1, samples=5))
    with pytest.raises(ValueError, match="no sample"):
        collected(peft_of(c), iter([]), c, passes=2)


def test_the_first_batch_can_be_seen_before() -> None:
    c = case("llama")
    empty = {key: value[:0] for key, value in next(iter(loader(c.samples))).items()}
    batches = Batches(iter([empty, *loader(c.samples)]))
    first = batches.first()
    assert torch.equal(first["input_ids"], next(iter(loader(c.samples)))["input_ids"])
    assert [batch["input_ids"].shape[0] for batch in batches] == [0, 4, 4, 4]
    assert Batches([]).first() is None


def test_float16_has_one_loss_scale_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the loudest gradient of the whole model, which is in the second group."""
    model = llama(layers=2)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.mul(2.0**-12).half())
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0**-6)
    c = Case(model, case("llama").samples, case("llama").targets, True)
    from filet.collect import run, scale

    scales: list[float] = []
    find = scale.loss_scale

    def counted(*args: Any) -> float:
        scales.append(find(*args))
        return scales[-1]

    monkeypatch.setattr(run, "loss_scale", counted)
    one = collected(peft_of(c, dtype=torch.float16), loader(c.samples), c, passes=1)
    two = collected(peft_of(c, dtype=torch.float16), loader(c.samples), c, passes=2)
    assert len(scales) == 2 and scales[0] == scales[1] > 1  # once a call, not once a pass
    assert_bitwise(two, one)


def test_a_pass_holds_its_own_moments_only(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    seen = []
    collect = passes_module.collect_moments

    def watched(*args: Any) -> Any:
        result = collect(*args)
        seen.append(list(result[0].moments))
        return result

    monkeypatch.setattr(passes_module, "collect_moments", watched)
    collected(peft_of(c), loader(c.samples), c, passes=2)
    assert seen == [[t for t in c.targets if f"layers.{layer}." in t] for layer in (0, 1)]


def fake_targets(shapes: dict[str, tuple[int, int]], device: Callable[[str], str]) -> Any:
    places = {name: torch.device(device(name)) for name in shapes}
    return {
        name: SimpleNamespace(shape=shape, device=places[name], sums=(torch.float32, places[name]))
        for name, shape in shapes.items()
    }


def test_groups_are_whole_blocks_of_about_equal_bytes() -> None:
    shapes = {f"model.layers.{i}.{part}": (8, 8) for i in range(9) for part in ("q", "k", "up")}
    targets = fake_targets({**shapes, "head": (8, 8)}, lambda name: "cpu")
    assert list(blocks(targets)) == [*(f"model.layers.{i}" for i in range(9)), ""]
    assert groups(targets, 1) == [list(targets)]
    for passes in range(1, 10):
        found = groups(targets, passes)
        assert len(found) == passes
        assert [name for group in found for name in group] == list(targets)
        counts = [len({name.rpartition(".")[0] for name in group}) for group in found]
        assert max(counts) - min(counts) <= 2
    assert len(groups(targets, 50)) == 10  # no more than there are blocks


def test_groups_divide_every_device() -> None:
    """Blocks in a row on one device must not be one group: it would hold what it holds anyway."""
    shapes = {f"layers.{i}.q": (8, 8) for i in range(8)}
    targets = fake_targets(shapes, lambda name: "cpu" if int(name[7]) < 4 else "meta")
    assert groups(targets, 2) == [
        [f"layers.{i}.q" for i in (0, 1, 4, 5)],
        [f"layers.{i}.q" for i in (2, 3, 6, 7)],
    ]


def moments_of(peft_model: Any, c: Any) -> Any:
    """Those of a pass: what there really is."""
    return filet.collect_statistics(
        peft_model, loader(c.samples), FiletConfig(passes=1), show_progress_bar=False
    ).moments


def test_passes_are_found_for_a_gpu_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    peft_model = peft_of(c)
    targets = find_targets(peft_model, "default")[0]
    batch = next(iter(loader(c.samples)))
    gpu = FakeGpu(monkeypatch, peft_model, free=10**9)
    monkeypatch.setattr(plan_module, "selection_bytes", lambda *_: 0)

    def passes(keep: bool = False) -> int:
        with filet.model.isolation.preserved(peft_model, "default", targets):
            return plan_module.passes_that_fit(
                peft_model, targets, batch, FiletConfig(), None, keep
            )

    [on] = filet.estimate(peft_model, batch).devices
    gpu.sizes.clear()
    assert passes() == 1 and gpu.sizes == []  # plenty: nothing is measured
    gpu.free = on.moments + on.fixed + 4 * on.per_sample
    assert passes() == 1 and gpu.sizes == [1, 2]
    assert passes(keep=True) == 2  # the inputs' moments are there twice
    [more] = filet.estimate(peft_model, batch, keep=True).devices
    gpu.free += more.moments - on.moments
    assert passes(keep=True) == 1
    inputs = {id(m.input): m.input for m in moments_of(peft_model, c).values()}
    assert more.moments - on.moments == sum(4 * len(m.sum) ** 2 for m in inputs.values())
    gpu.free -= more.moments - on.moments
    gpu.free -= 1
    with pytest.warns(UserWarning, match="2 times over the data.* batches of 2 would take 1,"):
        assert passes() == 2
    gpu.free = on.moments // 2 + on.fixed + 2 * on.per_sample
    with pytest.warns(UserWarning, match=r"batch of 4 samples × 9 tokens is likely to be too"):
        assert passes() == 2
    gpu.free = on.moments // 2 + on.fixed + on.per_sample - 1
    with pytest.raises(OutOfMemoryError, match=r"before the pass: .* one sample of 9 tokens"):
        passes()


# Memory that runs out.


def cuda_error(*_: Any) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB "
        "of which 1.20 GiB is free."
    )


def cpu_error(*_: Any) -> None:
    torch.empty(2**55, dtype=torch.float32)


def python_error(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (cuda_error, "2.50 GiB asked for on cuda:0"),
        (cpu_error, f"{2**57} bytes asked for of the host"),
        (python_error, "more than there is asked for"),
    ],
)
@pytest.mark.parametrize(("phase", "passes"), [("forward", 1), ("backward", 2)])
def test_a_shortage_is_named(fail: Any, said: str, phase: str, passes: int) -> None:
    c = case("llama")
    peft_model = peft_of(c)
    batches = [dict(batch) for batch in loader(c.samples, 5)]
    before = traces(peft_model)
    calls = itertools.count()
    module = peft_model.base_model.model.model.layers[0].mlp.act_fn
    register = {
        "forward": module.register_forward_hook,
        "backward": module.register_full_backward_hook,
    }[phase]
    handle = register(lambda *_: fail() if next(calls) == 1 else None)
    with pytest.raises(OutOfMemoryError) as caught:
        collected(peft_model, batches, c, passes=passes)
    handle.remove()
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError) and isinstance(error, MemoryError)
    assert error.phase == "pass" and error.__cause__ is not None
    text = str(error)
    assert f"the {phase} of batch 1 (counted from 0, 5 samples × 9 tokens): {said}" in text
    for words in ("--batch-size", "--max-length", "gradient checkpointing", "passes=N"):
        assert words in text
    assert_untouched(peft_model, before)
    expected = collected(peft_of(c), batches, c)
    assert_bitwise(collected(peft_model, batches, c), expected)  # and it works afterwards


def test_other_errors_are_left_alone() -> None:
    c = case("llama")
    peft_model = peft_of(c)

    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    peft_model.base_model.model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^something else$") as caught:
        collected(peft_model, loader(c.samples), c)
    assert type(caught.value) is RuntimeError


def test_a_shortage_after_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is what it was, and smaller batches are not what is advised."""
    c = case("llama")
    peft_model = peft_of(c)
    batches = list(loader(c.samples))
    before = copy.deepcopy(peft_model.state_dict())
    monkeypatch.setattr("filet.select.fisher_energies", lambda *_, **__: cuda_error())
    with pytest.raises(OutOfMemoryError, match=r"the selection .*: 2\.50 GiB asked for") as caught:
        filet.initialize_lora_filet_weights(peft_model, batches, show_progress_bar=False)
    assert caught.value.phase == "selection" and "--batch-size" not in str(caught.value)
    after = peft_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    monkeypatch.undo()
    statistics = collected(peft_model, batches, c)
    monkeypatch.setattr("filet.select.fisher_energies", lambda *_, **__: cuda_error())
    with pytest.raises(OutOfMemoryError, match="the selection"):
        filet.apply_statistics(peft_model, statistics)


@pytest.mark.parametrize(
    ("fails", "place"),
    [
        ("filet.model.targets.values", "the checks of the weights"),
        ("filet.collect.statistics.fingerprints_of", "the hashing of the weights"),
    ],
)
def test_a_shortage_before_the_pass(
    fails: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("llama")
    monkeypatch.setattr(fails, lambda *_: cuda_error())
    with pytest.raises(OutOfMemoryError, match=f"in {place}: 2.50 GiB asked for") as caught:
        filet.initialize_lora_filet_weights(peft_of(c), loader(c.samples), show_progress_bar=False)
    assert caught.value.phase == "checks" and "--batch-size" not in str(caught.value)


# On a GPU.


@pytest.mark.gpu
def test_the_plan_holds_on_a_gpu() -> None:
    """What is allocated at the worst moment is at most what was planned, and not far below it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = llama(
        layers=4, hidden_size=1024, intermediate_size=2816, vocab_size=8000,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    ids = torch.randint(3, 8000, (16, 256))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    names = [t for t in case("llama").targets if ".0." in t]
    targets = [t.replace(".0.", f".{layer}.") for layer in range(4) for t in names]
    c = Case(model, samples, targets, True)
    peft_model = peft_of(c, "cuda", torch.bfloat16)
    batch = next(iter(loader(samples, 16)))
    for passes in (1, 2):
        config = FiletConfig(samples=16, passes=passes)
        plan = filet.estimate(peft_model, batch, config, batch_size=16)
        [on] = plan.devices
        before = torch.cuda.memory_allocated()
        statistics = collected(peft_model, [batch], c, passes=passes)
        used = statistics.peak_memory - before
        planned = on.needed(16, passes)
        # The batch itself, workspaces of the kernels, and rounding to blocks: 64 MiB.
        assert 0.7 * planned <= used <= planned + 2**26, (plan, used)
        assert plan.shared_input == statistics.shared_input
        if passes == 2:
            kept = [side.sum for pair in sides(statistics).values() for side in pair]
            assert {tensor.device.type for tensor in kept} == {"cpu"}
        del statistics
