"""Boundaries and weights of a blockwise run, between the device, host memory and disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    BOUNDARY,
    CHEAP,
    LAYERS,
    MARKS,
    Crash,
    Failing,
    assert_equal,
    in_step,
    initialize,
    run_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from filet.blockwise.arenas import Arena, ArenaPool, Layout, check_pinned
from filet.blockwise.disk import Abandoned, Disk
from filet.blockwise.division import size_of
from filet.blockwise.folder import empty_model
from filet.blockwise.inputs import BlockInputs
from filet.blockwise.keeping import Keeping
from filet.blockwise.machine import Clock, Machine
from filet.blockwise.stream import WeightStream
from filet.blockwise.weights import ShardedWeights, Stored
from filet.model.chain import Parts
from filet.model.checkpoint import Entry, entries

LAYOUT = Layout([torch.Size((2, 8))], torch.float32)
CPU = torch.device("cpu")

pytestmark = MARKS


# What is kept where.


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
        assert run.plan is not None and run.boundaries is not None
        made = run.boundaries.pool.made
        assert (run.plan.stride, run.plan.on_disk) == (stride, on_disk)
        assert made <= arenas
        assert run.plan.scratch_bytes == on_disk * BOUNDARY
        assert run.plan.host_bytes >= made * BOUNDARY
        assert [len(run.times.blocks[sweep]) for sweep in ("forward", "reverse")] == [LAYERS] * 2
        again = len(run.times.blocks["recomputed"])
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


@pytest.mark.parametrize("one_disk", [True, False])
def test_the_plan_knows_a_slow_scratch_disk(one_disk: bool, folder: Path, tmp_path: Path) -> None:
    class Slow(Disk):
        """Of which there are one, or two."""

        busy = threading.Lock() if one_disk else contextlib.nullcontext()

        def save(self, path: Path, *args: Any, **more: Any) -> None:
            with self.busy:
                time.sleep(0.1 * path.match("*.raw*"))
                super().save(path, *args, **more)

        def load(self, path: Path, *args: Any, **more: Any) -> bytes:
            with self.busy:
                time.sleep(0.2)
                return super().load(path, *args, **more)

        def is_one(self, one: Path, other: Path) -> bool:
            return one_disk

    settings: Any = {**CHEAP, "host_memory": 5 * BOUNDARY, "scratch": tmp_path / "scratch"}
    with run_of(folder, tmp_path, machine=in_step(disk=Slow()), **settings) as run:
        run.sweep()
        assert run.plan is not None and run.plan.on_disk == LAYERS
        planned = sum(run.plan.seconds.values())
        took = sum(run.times.seconds[sweep] for sweep in run.plan.seconds)
    assert LAYERS * 0.3 < took
    assert abs(planned / took - 1) < 0.25, (run.plan.seconds, run.times.seconds)


def test_a_full_scratch_disk(folder: Path, tmp_path: Path) -> None:
    full = Failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after=1)
    place: Any = {"host_memory": 5 * BOUNDARY, "scratch": tmp_path / "scratch"}
    with pytest.raises(OSError, match="No space left"):
        initialize(folder, tmp_path / "out", machine=in_step(disk=full), **place)
    assert not (tmp_path / "out.filet-run").exists()  # there was nothing to go on from
    assert not list((tmp_path / "scratch").iterdir())


# Files.


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
    layout = Layout([torch.Size((3, 1000)), torch.Size((7,))], torch.float32)
    arena = Arena(layout, False)
    arena.views[0].copy_(torch.arange(3000.0).view(3, 1000))
    before = arena.buffer.clone()
    pool = ArenaPool(layout, 1, CPU)
    inputs = BlockInputs(pool, tmp_path, Disk(4096))
    assert not list(tmp_path.iterdir())
    assert min(inputs.speed(arena)) > 0
    wait([inputs.write(3, arena)])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == layout.nbytes == 4 * 4096
    again = inputs.take(3)
    assert torch.equal(again.buffer, before) and torch.equal(arena.buffer, before)
    assert not list(tmp_path.iterdir())
    assert len(direct) == 4 and set(direct) == {refused is None}
    wait([inputs.write(4, arena)])
    file = tmp_path / "inputs-4.raw"
    file.write_bytes(b"short")
    pool.put(again)
    with pytest.raises(ValueError, match=f"has 5 bytes; expected {layout.nbytes}"):
        inputs.take(4)
    inputs.close()
    pool.close()


def test_a_file_is_abandoned_between_two_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout([torch.Size((3, 1000))], torch.float32)
    arena = Arena(layout, False)
    arena.views[0].copy_(torch.arange(3000.0).view(3, 1000))
    disk = Disk(4096)
    path, abandon, synced = tmp_path / "file", threading.Event(), 0

    def sync(_: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 2:
            abandon.set()

    arena.save(disk, path, b"end", threading.Event())
    again = Arena(layout, False)
    assert again.load(disk, path, 3) == b"end"
    assert torch.equal(again.views[0], arena.views[0])
    monkeypatch.setattr(os, "fdatasync", sync)
    with pytest.raises(Abandoned):
        arena.save(disk, path, b"end", abandon)
    assert path.stat().st_size == 2 * 4096


# Arenas.


class Arenas:
    """Makes arenas, and counts those made and freed."""

    def __init__(self) -> None:
        self.made = self.freed = 0

    def __call__(self, layout: Layout, pinned: bool) -> Arena:
        arena = Arena(layout, pinned)
        free = arena.free

        def freed() -> None:
            free()
            self.freed += 1

        arena.free = freed  # type: ignore[method-assign]
        self.made += 1
        return arena


def test_arenas_made_ahead() -> None:
    arenas = Arenas()
    pool = ArenaPool(LAYOUT, 4, CPU, ahead=3, make=arenas)
    with pool.paused():
        before = arenas.made
        assert before + pool.making == 3
        assert arenas.made == before
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
    assert arenas.made == arenas.freed == 4


def test_arenas_made_ahead_are_freed_after_an_exception(folder: Path, tmp_path: Path) -> None:
    arenas = Arenas()

    class Stopped(Clock):
        """Fails where a device is waited for: in the rehearsal."""

        def settled(self, device: torch.device) -> float:
            raise Crash

    def ahead(layout: Layout, limit: int, device: torch.device, ahead: int) -> ArenaPool:
        return ArenaPool(layout, limit, device, 4, arenas)

    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=Machine(clock=Stopped(), pool=ahead))
    assert arenas.made == arenas.freed >= 1


def test_an_arena_that_cannot_be_made() -> None:
    def fails(*_: Any) -> Arena:
        check_pinned(1, 2**30)  # what CUDA answers where too much is locked
        raise AssertionError

    pool = ArenaPool(LAYOUT, 2, CPU, ahead=1, make=fails)
    with pytest.raises(ValueError, match=r"pinning 1\.00 GiB .* expected a smaller host_memory"):
        pool.get()
    pool.close()


# Weights.


def test_weights_come_and_go(folder: Path, device: torch.device) -> None:
    model = empty_model(folder)
    source = ShardedWeights(folder, model, share=2**8)  # several threads for a piece
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    groups = [[entry] for entry in entries(model)]
    stream = WeightStream(source, device, piece=2**10)  # several for a weight
    for index in stream.loaded(groups):
        for name in groups[index][0].names:
            assert torch.equal(model.state_dict()[name].cpu(), expected[name])
        here = {name for name, value in model.state_dict().items() if not value.is_meta}
        assert here == {*groups[index][0].names}
    assert all(value.is_meta for value in model.state_dict().values())
    with closing(stream.loaded(groups)) as loaded:
        next(loaded)  # an early end stops the thread
    assert all(value.is_meta for value in model.state_dict().values())


@pytest.mark.parametrize("ends", ["early", "late"])
def test_what_has_been_closed_holds_no_places(folder: Path, ends: str) -> None:
    model = empty_model(folder)
    groups = [entries(model)]
    size = size_of(groups[0])

    def places() -> list[Tensor]:
        found = [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.uint8]
        return [place for place in found if place.numel() == size]

    with closing(WeightStream(ShardedWeights(folder, model), CPU).loaded(groups)) as loaded:
        next(loaded)
        assert places()
        if ends == "late":
            assert next(loaded, None) is None
    assert loaded is not None and not places()


def test_the_next_sweep_loads_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's weights while the last block runs, the last block's while the head does."""
    model = empty_model(folder)
    asked: Counter[str] = Counter()  # since the sweeps began
    changed = threading.Condition()
    in_time: dict[str, bool] = {}

    class Asked(ShardedWeights):
        def tensors(self, wanted: Sequence[Entry]) -> Iterator[Any]:
            if run.plan is not None:
                with changed:
                    asked.update(name for entry in wanted for name in entry.names)
                    changed.notify_all()
            return super().tensors(wanted)

    def wait_for(name: str, times: int) -> bool:
        with changed:
            return changed.wait_for(lambda: asked[name] >= times, timeout=10)

    run_block, epilogue = Parts.run_block, Parts.epilogue

    def last_block(parts: Parts, block: int, *args: Any) -> Tensor:
        if run.plan is not None and block == LAYERS - 1 and "head" not in in_time:
            in_time["head"] = wait_for("lm_head.weight", 1)
        return run_block(parts, block, *args)

    def head(parts: Parts, *args: Any) -> Any:
        if run.plan is not None and "block" not in in_time:
            # The forward sweep asked for it as well.
            name = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
            in_time["block"] = wait_for(name, 2)
        return epilogue(parts, *args)

    monkeypatch.setattr(Parts, "run_block", last_block)
    monkeypatch.setattr(Parts, "epilogue", head)
    with run_of(folder, tmp_path, model, source=Asked(folder, model)) as run:
        run.sweep()
    assert in_time == {"head": True, "block": True}


@pytest.mark.parametrize("share", [100, 2**20])
def test_parts_of_a_weight(share: int, folder: Path) -> None:
    model = empty_model(folder)
    source = ShardedWeights(folder, model, share)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for entry, stored in source.tensors(entries(model)):
        assert isinstance(stored, Stored)
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
        next(WeightStream(source, CPU).loaded([entries(model)]))


def test_an_error_of_the_loading_thread_arrives(folder: Path) -> None:
    model = empty_model(folder)

    class Broken:
        def tensors(self, wanted: Any) -> Iterator[Any]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def made_with(self, entry: Entry) -> str | None:
            return None

        def identity(self) -> dict[str, Any]:
            return {}

    with pytest.raises(OSError, match="Input/output error"):
        next(WeightStream(Broken(), CPU).loaded([entries(model)]))
