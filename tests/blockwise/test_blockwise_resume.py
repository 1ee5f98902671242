"""A blockwise run that was killed or failed goes on; its folder belongs to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    assert_same_adapter,
    batches,
    in_step,
    initialize,
    is_arena,
    kept,
    lora,
    run_of,
)
from safetensors.torch import load_file, save_file

import filet
from filet import FiletConfig, FiletReport
from filet.blockwise.disk import Disk
from filet.blockwise.engine import Blockwise
from filet.blockwise.journal import Journal
from filet.blockwise.machine import Machine
from filet.blockwise.sweeps import Reverse
from filet.model.chain import Parts

pytestmark = MARKS


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


def killed_at_rename(number: int, folder: Path, output: Path, **more: Any) -> int:
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
        initialize(folder, output, machine=in_step(), **CHEAP, **more)

    process = in_child(run)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


# Killed.


@forks
@pytest.mark.parametrize("keep", [None, kept()], ids=["task", "keep"])
def test_killed_before_any_file_takes_its_place(keep: Any, folder: Path, tmp_path: Path) -> None:
    """A run is killed at its first file, goes on and is killed at its second, ..."""
    initialize(folder, tmp_path / "whole", **CHEAP, keep=keep)
    output, run = tmp_path / "out", tmp_path / "out.filet-run"
    kills = 0
    before: dict[str, tuple[int, int]] = {}
    # The manifest, the head's gradient, and two files a block but for the last.
    for number in (1, 2, 3, 3, 2, 4, 3, 2, 3, 2, 2):
        if killed_at_rename(number, folder, output, keep=keep) == 0:
            break
        kills += 1
        assert not output.exists()
        assert_untouched(before, run)
        before = block_files(run)
    else:
        initialize(folder, output, **CHEAP, keep=keep)
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


# Failed.


def test_a_full_disk_is_said_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize(folder, tmp_path / "whole")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    with pytest.raises(OSError, match="No space left"):
        initialize(folder, tmp_path / "out", machine=in_step(disk=Failing(full, after=3)))
    run = tmp_path / "out.filet-run"
    before = block_files(run)
    assert len(before) == 2
    assert not list(run.glob(".*"))
    gradients = []
    finish = Reverse.finish

    def watched(reverse: Reverse, block: int, *args: Any) -> Any:
        gradients.append(block)
        assert_untouched(before, run)
        return finish(reverse, block, *args)

    monkeypatch.setattr(Reverse, "finish", watched)
    initialize(folder, tmp_path / "out", machine=in_step())
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


def test_float16_resumes_with_its_scale(folder: Path, tmp_path: Path) -> None:
    initialize(folder, tmp_path / "whole", dtype=torch.float16)
    failing = in_step(disk=Failing(Crash(), after=3))
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=failing, dtype=torch.float16)
    initialize(folder, tmp_path / "out", dtype=torch.float16)
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


# A disk that is behind.


class Writers(ThreadPoolExecutor):
    """What it was given to write can be waited for."""

    def __init__(self) -> None:
        super().__init__(2)
        self.futures: list[Future[Any]] = []

    def submit(self, *args: Any, **more: Any) -> Future[Any]:  # type: ignore[override]
        self.futures.append(super().submit(*args, **more))
        return self.futures[-1]


@pytest.mark.parametrize(("killed", "finished"), [(3, 5), (1, 2)])
def test_a_slow_disk_does_not_hold_up_the_run(
    killed: int, finished: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were done meanwhile are finished together, and a resumed run knows them."""
    initialize(folder, tmp_path / "whole")
    caught_up = threading.Event()

    class Slow(Disk):
        def save(self, path: Path, *args: Any, **more: Any) -> None:
            if f"gradient-{LAYERS - 1}" in path.name:
                assert caught_up.wait(60)
            super().save(path, *args, **more)

    writers = Writers()
    finish = Reverse.finish
    redone = []

    def watched(reverse: Reverse, block: int, *args: Any) -> Any:
        redone.append(block)
        if block in (LAYERS - 3, killed):
            caught_up.set()
            wait(writers.futures)
        if block == killed:
            raise Crash
        return finish(reverse, block, *args)

    monkeypatch.setattr(Reverse, "finish", watched)
    with pytest.raises(Crash):
        slow = Machine(disk=Slow(), writers=lambda: writers)
        initialize(folder, tmp_path / "out", machine=slow)
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
    arenas: int, folder: Path, tmp_path: Path
) -> None:
    """A disk so slow that the first gradient is not there when all blocks are done.

    It has its arena all that time; the least host memory that is taken is enough.
    """
    initialize(folder, tmp_path / "whole")
    written = []

    class Slow(Disk):
        def save(
            self, path: Path, data: Any, trailer: bytes = b"", abandon: Any = None, **more: Any
        ) -> None:
            if is_arena(path):
                assert abandon is not None
                assert abandon.wait(60)
                written.append(path)
            super().save(path, data, trailer, abandon, **more)

    more: Any = {"host_memory": arenas * BOUNDARY, "machine": Machine(disk=Slow())}
    with run_of(folder, tmp_path, **more) as run:
        run.sweep()
        assert run.boundaries is not None
        assert run.boundaries.pool.made == arenas == run.boundaries.keeping.arenas
        names = sorted(path.name for path in run.journal.folder.iterdir())
        blocks = [f"block-{block}.safetensors" for block in range(LAYERS)]
        assert names == [*blocks, "lock", "manifest.json"]
        run.write(tmp_path / "out")
    assert len(written) == 1
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


def test_no_gradient_comes_before_the_blocks_that_it_finishes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {block: threading.Event() for block in range(LAYERS)}
    run = tmp_path / "out.filet-run"

    class Watched(Disk):
        def save(self, path: Path, *args: Any, **more: Any) -> None:
            kind, block = path.name.split(".")[1].split("-")
            if kind == "block" and int(block) > 0:
                assert there[int(block) - 1].wait(60)
                time.sleep(0.05)  # for a rename that does not wait
                assert not (run / f"gradient-{int(block) - 1}.raw").exists()
            super().save(path, *args, **more)
            if kind == "gradient":
                there[int(block)].set()

    is_behind = Journal.is_behind

    def in_time(journal: Journal) -> bool:
        journal.settle()
        return is_behind(journal)

    monkeypatch.setattr(Journal, "is_behind", in_time)
    initialize(folder, tmp_path / "out", machine=Machine(disk=Watched()), **CHEAP)
    assert all(event.is_set() for event in there.values())


# The run folder.


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path) -> Path:
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=in_step(disk=Failing(Crash())))
    return tmp_path / "out"


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_blocks_have_what_their_start_needs(start: Any, folder: Path, tmp_path: Path) -> None:
    """B where it is not 0, also of the disk that is asked for; and a run goes on from them."""
    config = FiletConfig(start=start)
    initialize(folder, tmp_path / "whole", "memory", config=config)
    with pytest.raises(Crash):
        initialize(folder, tmp_path / "out", machine=in_step(disk=Failing(Crash())), config=config)
    files = list((tmp_path / "out.filet-run").glob("block-*"))
    assert files
    for path in files:
        sides = {key.rpartition(".")[2] for key in load_file(path)}
        assert sides == {"A", "energies", "indices"} | ({"B"} if start == "untouched" else set())
    (gradient,) = (tmp_path / "out.filet-run").glob("gradient-*")
    gradients = 2 * gradient.stat().st_size
    initialize(folder, tmp_path / "out", config=config)
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")

    with run_of(folder, tmp_path, config=config) as run:
        run.sweep()
        tensors = [load_file(path) for path in run.journal.folder.glob("block-*")]
        content = sum(
            value.nbytes for file in tensors for key, value in file.items() if "indices" not in key
        )
        assert run.journal.reserved == gradients + content


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
        ({"keep": kept()}, "keep is None there and '[0-9a-f]+' now"),
        ({"config": FiletConfig(select="max")}, r"settings\.select is 'min' there and 'max' now"),
        ({"config": FiletConfig(start="untouched")}, r"start is 'zero' there and 'untouched' now"),
        ({"config": FiletConfig(gamma=2.0)}, r"settings\.gamma is 1\.3\d* there and 2\.0 now"),
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
        failing = in_step(disk=Failing(Crash(), after=0))
        with pytest.raises(Crash):
            initialize(folder, tmp_path / "out", machine=failing, **CHEAP)
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
        seen.append((run.journal.folder, run.scratch))
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
