"""The blockwise engine in several processes, beside one process with all samples."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import (
    LAYERS,
    Crash,
    assert_equal,
    assert_same_adapter,
    boundary,
    in_step,
    initialize,
    kept,
    model_folder,
)
from torch import Tensor

import filet
import models
from filet import FiletConfig, FiletReport
from filet.blockwise.batches import read_batches
from filet.blockwise.disk import Disk
from filet.blockwise.division import divided, size_of
from filet.blockwise.folder import empty_model
from filet.blockwise.gradients import Gradients
from filet.blockwise.journal import Journal
from filet.blockwise.samples import samples_of
from filet.blockwise.stream import WeightStream
from filet.blockwise.sweeps import Reverse
from filet.blockwise.weights import ShardedWeights, Stored
from filet.distributed.channel import Channel
from filet.distributed.group import current
from filet.model.checkpoint import Entry, entries
from filet.model.folder import quantization_of
from ranks import errors, run, values

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")

# Of each rank, its samples. One with few, and one without any.
SPLITS = {
    1: (range(12),),
    2: (range(0, 7), range(7, 12)),
    3: (range(0, 8), range(0), range(8, 12)),
}
CPU = torch.device("cpu")


def batches(rank: int, size: int) -> list[dict[str, Tensor]]:
    samples = models._text(1)
    return list(models.loader([samples[index] for index in SPLITS[size][rank]], 3))


def initialise(folder: Path, output: Path, rank: int = 0, size: int = 1, **more: Any) -> Any:
    """By the engine, of which a ``machine`` is given only where one process has to fail."""
    FiletReport.plot = lambda report, path: Path(path).touch()  # type: ignore[method-assign]
    settings: dict[str, Any] = {"batches": batches(rank, size), "config": FiletConfig(samples=None)}
    return initialize(folder, output, **{**settings, **more})


def on_rank(rank: int, folder: Path, model: Path, size: int, keep: bool, more: Any) -> FiletReport:
    if keep:
        more = {**more, "keep": kept_on(rank, size)}
    report: FiletReport = initialise(model, folder / "many", rank, size, **more)
    return report


def kept_on(rank: int, size: int) -> list[dict[str, Tensor]]:
    """The other way round: who has no sample of the task has some to keep."""
    return [kept()[:1], kept()[1:], []][rank] if size == 3 else kept()[rank::size]


@pytest.mark.parametrize(
    ("kind", "size", "keep", "start"),
    [
        ("llama", 2, False, "untouched"),
        ("llama", 3, True, "zero"),
        ("mixtral", 2, False, "zero"),
        ("gpt2", 3, False, "zero"),
    ],
)
def test_ranks_equal_one(kind: str, size: int, keep: bool, start: Any, tmp_path: Path) -> None:
    sampled = start == "untouched"
    config = FiletConfig(samples=None, start=start, fisher="sampled" if sampled else "empirical")
    more: dict[str, Any] = {"config": config}
    files = [tmp_path / f"{name}.safetensors" for name in ("many", "one")]
    saves = [{"save_statistics": file} if kind == "llama" else {} for file in files]
    model = model_folder(kind)
    settings = {**more, **saves[0]}
    many = values(run(size, on_rank, tmp_path, model, size, keep, settings, launched=keep))
    more |= {"keep": kept() if keep else None, **saves[1]}
    one = initialise(model, tmp_path / "one", **more)
    # With data to keep they are eigenvalues and vectors, which amplify the rounding of sums.
    rel, of_A = (3e-5, 1e-4) if keep else (1e-5, 1e-5)
    for report in many:
        assert_equal(report, one, rel)
    assert_equal(FiletReport.load(tmp_path / "many"), many[0], 0)
    assert_same_adapter(tmp_path / "many", tmp_path / "one", of_A)
    left = {"many", "one", *(file.name for file in files if any(saves))}
    assert {path.name for path in tmp_path.iterdir()} - {"rendezvous"} == left
    if any(saves):
        assert_same_statistics(*files)


def assert_same_statistics(many: Path, one: Path) -> None:
    mine, theirs = filet.Statistics.load(many), filet.Statistics.load(one)
    for key in (
        "samples",
        "tokens",
        "loss_terms",
        "data",
        "fingerprints",
        "shared_input",
        "keep_tokens",
    ):
        assert getattr(mine, key) == getattr(theirs, key), key
    for name, its in theirs.moments.items():
        both = [(mine.moments[name].input, its.input), (mine.moments[name].output, its.output)]
        both += [(mine.keep[name], theirs.keep[name])] if mine.keep and theirs.keep else []
        for here, there in both:
            assert here.space == there.space and int(here.count) == int(there.count)
            largest = float(there.sum.abs().max())
            torch.testing.assert_close(here.sum, there.sum, rtol=1e-5, atol=1e-5 * largest)


def on_little_memory(rank: int, folder: Path, model: Path, scratch: bool) -> list[str]:
    """What goes to the scratch folder; the least host memory that is taken, for two processes."""
    names, save = [], Disk.save

    def noted(disk: Disk, path: Path, *args: Any, **more: Any) -> None:
        if "inputs-" in path.name:
            names.append(str(path.relative_to(folder / "scratch").parts[1:]))
        save(disk, path, *args, **more)

    Disk.save = noted  # type: ignore[method-assign]
    place = {"scratch": folder / "scratch"} if scratch else {}
    memory = 2 * (5 if scratch else 6) * boundary(batches(0, 2))
    initialise(model, folder / "many", rank, 2, host_memory=memory, overwrite=True, **place)
    return names


def with_too_little(rank: int, folder: Path, model: Path) -> None:
    memory = 2 * 5 * boundary(batches(0, 2))
    initialise(model, folder / "many", rank, 2, host_memory=memory, overwrite=True)


def test_host_memory_is_shared_and_scratch_is_each_ones_own(tmp_path: Path) -> None:
    model = model_folder("llama")
    initialise(model, tmp_path / "one")
    for scratch in (True, False):  # without it, blocks are recomputed
        ranks = values(run(2, on_little_memory, tmp_path, model, scratch))
        for rank, names in enumerate(ranks):
            wanted = [str((str(rank), f"inputs-{block}.raw")) for block in range(LAYERS)]
            assert sorted(names) == (wanted if scratch else [])
        assert_same_adapter(tmp_path / "many", tmp_path / "one")
    for said in errors(run(2, with_too_little, tmp_path, model)):
        assert "expected host_memory of at least 144 KiB, or 120 KiB and a scratch" in said
    assert not any((tmp_path / "scratch").iterdir())


# Weights.


class Counted(ShardedWeights):
    """How many numbers were read."""

    asked = 0

    def tensors(self, wanted: Sequence[Entry]) -> Iterator[Any]:
        for entry, found in super().tensors(wanted):
            if isinstance(found, Tensor):
                self.asked += found.numel()
                yield entry, found
            else:
                yield entry, _Part(found, self)


class _Part(Stored):
    def __init__(self, stored: Stored, source: Counted) -> None:
        self.__dict__ |= {**vars(stored), "source": source}

    def read(self, start: int, goal: Tensor) -> None:
        self.__dict__["source"].asked += goal.numel()
        super().read(start, goal)


def streamed(rank: int, folder: Path, model: Path, quantize: Any) -> tuple[int, int]:
    """How many numbers this rank read of how many. What came is what one process has."""
    group = current()
    assert group is not None
    empty = empty_model(
        model, quantization_config=quantization_of(model, quantize) if quantize else None
    )
    found = entries(empty)
    groups = [found[:3], found[3:4], [], found[4:]]
    source = Counted(model, empty)
    alone = WeightStream(ShardedWeights(model, empty), CPU)
    shared = WeightStream(source, CPU, channel=Channel(group, CPU))
    seen: list[list[dict[str, Tensor]]] = [[], []]
    for index, stream in enumerate((alone, shared)):
        with closing(stream.loaded(groups)) as loaded:
            for _ in loaded:
                there = {n: v.clone() for n, v in empty.state_dict().items() if not v.is_meta}
                seen[index].append(there)
    for one, other in zip(*seen, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sum(map(len, seen[0])) >= len(found)
    return source.asked, sum(part.shape.numel() for entry in found for part in entry.stored)


@pytest.mark.parametrize(
    ("kind", "quantize", "size"), [("llama", None, 3), ("mixtral", None, 2), ("llama", "nf4", 3)]
)
def test_each_rank_reads_its_share(kind: str, quantize: Any, size: int, tmp_path: Path) -> None:
    ranks = values(run(size, streamed, tmp_path, model_folder(kind), quantize))
    asked, whole = [each for each, _ in ranks], ranks[0][1]
    if kind == "llama":
        assert sum(asked) == whole
        # Pieces are of 256 bytes; a weight that is quantised is read by one rank.
        assert max(asked) - min(asked) <= (64 * 2 * 3 if quantize is None else 2 * 48 * 32)


def test_the_division_of_a_group() -> None:
    """Whole weights to whoever reads least, then ranges that bring all to one level."""

    def entry(name: str, numbers: int) -> Entry:
        return Entry((name,), torch.Size((numbers,)), torch.float32, ())

    group = [entry("a", 1000), entry("b", 70), entry("c", 6), entry("d", 3000), entry("e", 64)]
    made = {"b": "one", "c": "one", "d": "two"}
    found = divided(group, 3, lambda each: made.get(each.names[0]))
    assert [each.names[0] for each in found.group] == ["b", "c", "d", "a", "e"]
    assert len(found.whole) == 3 and found.whole[0] == found.whole[1] != found.whole[2]
    covered = 0
    for start, stop, _ in found.cuts:
        assert start == covered and stop % 256 == 0
        covered = stop
    assert covered == size_of(group)
    read = [sum(b - a for a, b, reader in found.cuts if reader == rank) for rank in range(3)]
    heavy = found.whole[2]
    # "d" alone is more than a third: its rank reads nothing else, the others as much as each other.
    assert read[heavy] == -(-12000 // 256) * 256
    assert abs(read[heavy - 1] - read[heavy - 2]) <= 2 * 256


# Samples.


def test_a_sample_is_the_same_in_any_batch() -> None:
    found: list[dict[str, int]] = []
    model = empty_model(model_folder("llama"))
    for size, side, order in ((3, "right", 1), (5, "left", -1)):
        data = list(models.loader(models._text(1)[::order], size, side))
        read, counts = read_batches(data, FiletConfig(samples=None), model)
        assert counts["samples"] == 12
        its = [sample for batch in read for sample in samples_of(batch)]
        found.append({sample.digest: sample.tokens for sample in its})
    assert found[0] == found[1] and len(found[0]) == 12
    assert sorted(found[0].values()) == sorted(models.LENGTHS)
    other = models._text(1)
    other[4]["labels"][3] = -100
    read, _ = read_batches(list(models.loader(other, 3)), FiletConfig(samples=None), model)
    changed = {sample.digest for batch in read for sample in samples_of(batch)}
    assert len(changed & found[0].keys()) == 11


# Failures, and going on.


def interrupted(rank: int, folder: Path, model: Path, size: int, block: int, how: Any) -> None:
    """One rank fails when it is to finish a block; what the others need to go on is there."""
    finish, machine = Reverse.finish, in_step()
    gradients = Gradients(folder / "out.filet-run", machine.disk)

    def failing(reverse: Reverse, number: int, *args: Any) -> Any:
        if number == block and rank == size - 1:
            until = time.monotonic() + 60
            while block not in gradients.complete():  # another process is behind
                assert time.monotonic() < until, "a gradient is gone"
                time.sleep(0.01)
            if how is None:
                raise Crash("enough")
            os.kill(os.getpid(), how)
        return finish(reverse, number, *args)

    Reverse.finish = failing  # type: ignore[method-assign]
    save_gradient = Journal.save_gradient

    def at_once(journal: Journal, *args: Any) -> None:
        """A disk that is behind would leave the next out, and its block be done again."""
        if rank == 0:
            time.sleep(0.2)  # the others' are there before it removes what nobody needs any more
        save_gradient(journal, *args)
        journal.settle()

    Journal.save_gradient = at_once  # type: ignore[method-assign]
    group = current()
    assert group is not None
    with group:
        initialise(model, folder / "out", rank, size, machine=machine, group=group)


def resumed(rank: int, folder: Path, model: Path, size: int) -> list[int]:
    """Which blocks are finished by the run that goes on."""
    done, finish = [], Reverse.finish

    def watched(reverse: Reverse, number: int, *args: Any) -> Any:
        done.append(number)
        return finish(reverse, number, *args)

    Reverse.finish = watched  # type: ignore[method-assign]
    initialise(model, folder / "out", rank, size)
    return done


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [(3, 2, None), (2, 3, signal.SIGKILL), (3, 1, None)],
)
def test_a_run_goes_on_in_other_processes(
    before: int, after: int, how: Any, tmp_path: Path
) -> None:
    model, block = model_folder("llama"), LAYERS - 3
    said = run(before, interrupted, tmp_path, model, before, block, how)
    if how is None:
        heard = errors(said)
        assert heard[-1] == "Crash: enough"
        assert heard[:-1] == [f"RuntimeError: rank {before - 1}: Crash: enough"] * (before - 1)
    else:
        assert said[-1].exitcode == -how
        assert all("lost another process" in each for each in errors(said[:-1]))
    folder = tmp_path / "out.filet-run"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("block-*")}
    assert {path.name for path in finished} == {
        f"block-{number}.safetensors" for number in range(block + 1, LAYERS)
    }
    if after == 1:
        initialise(model, tmp_path / "out")
    else:
        (done, *others) = values(run(after, resumed, tmp_path, model, after))
        assert all(each == done for each in others)
        assert done == list(range(block, -1, -1))
    assert not folder.exists()
    one = initialise(model, tmp_path / "one")
    assert_equal(FiletReport.load(tmp_path / "out"), one, 1e-5)
    assert_same_adapter(tmp_path / "out", tmp_path / "one")


def killed(rank: int, folder: Path, model: Path, size: int) -> None:
    """The first process is lost; the second hears of it after the third."""
    finish = Reverse.finish

    def finished(reverse: Reverse, number: int, *args: Any) -> Any:
        if number == LAYERS - 3 and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == LAYERS - 3 and rank == 1:
            time.sleep(2)
        return finish(reverse, number, *args)

    Reverse.finish = finished  # type: ignore[method-assign]
    initialise(model, folder / "out", rank, size)


def test_two_processes_that_lose_a_third_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Nor as they end: one has left what the other waits in, and waits for what that has not."""
    model = model_folder("llama")
    ended = run(3, killed, tmp_path, model, 3)
    assert ended[0].exitcode == -signal.SIGKILL
    assert all("lost another process" in each for each in errors(ended[1:]))
    initialise(model, tmp_path / "out")
    initialise(model, tmp_path / "one")
    assert_same_adapter(tmp_path / "out", tmp_path / "one")


def in_turn(rank: int, folder: Path, model: Path) -> list[str]:
    """What is said where the second rank fails in a part of a run; the processes go on."""
    import filet.blockwise.engine as engine
    import filet.blockwise.head as head
    from filet.model.chain import Parts

    parts: list[tuple[Any, str, int]] = [
        (engine, "read_batches", 0),
        (Parts, "capture", 1),
        (ShardedWeights, "tensors", 6),
        (Parts, "run_block", 9),
        (head, "loss_gradient", 1),
        (engine, "write_folder", 0),
    ]
    said = []
    for place, name, calls in parts:
        with pytest.MonkeyPatch.context() as patch:
            # The report is the first rank's.
            if rank == (name != "write_folder"):
                patch.setattr(place, name, failing_after(getattr(place, name), calls))
            with pytest.raises(OSError) as raised:
                initialise(model, folder / "out", rank, 2)
        said.append(str(raised.value))
        assert not (folder / "out").exists()
        assert (folder / "out.filet-run").exists() == (name == "write_folder") or rank
    with pytest.raises(ValueError) as differs:
        initialise(model, folder / "out", rank, 2, config=FiletConfig(samples=None, seed=rank))
    initialise(model, folder / "out", rank, 2)
    return [*said, str(differs.value)]


def failing_after(function: Any, calls: int) -> Any:
    count = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise OSError("the disk is gone")
        return function(*args, **more)

    return counted


def test_an_exception_anywhere_ends_all(tmp_path: Path) -> None:
    first, second = values(run(2, in_turn, tmp_path, model_folder("llama")))
    *heard, last, differs = first
    assert heard == ["rank 1: the disk is gone"] * 5 and last == "the disk is gone"
    assert second[:-1] == ["the disk is gone"] * 5 + ["rank 0: the disk is gone"]
    assert differs == second[-1]
    assert "settings.seed is 1 on rank 1 and 0 on rank 0" in differs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rendezvous"]
