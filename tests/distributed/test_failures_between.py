"""One process fails between an exchange and the tensors that follow it: nobody waits for these."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from blockwise_runs import initialize, kept, model_folder

import filet
import models
from filet import FiletConfig, FiletReport
from models import case, loader, peft_of
from ranks import run, values

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")

# What raises, in which process, and after how many calls of a run. "torch.empty" is what the module
# knows as torch.
BLOCKWISE = [
    ("filet.distributed.exchange._place", 0, 3),
    ("filet.distributed.exchange._place", 1, 0),
    ("filet.distributed.exchange._packed", 0, 0),
    ("filet.distributed.exchange._packed", 1, 3),
    ("filet.distributed.exchange._unpacked", 0, 1),
    ("filet.distributed.exchange._unpacked", 1, 0),
    ("filet.distributed.exchange.pack", 1, 7),  # of statistics on their way to the first process
    ("filet.distributed.exchange.unpack", 0, 4),
    ("filet.distributed.exchange.torch.empty", 0, 9),
    ("filet.distributed.exchange.torch.empty", 1, 9),
    ("filet.collect.together.Together._square", 1, 0),
    ("filet.collect.together.Together._sums", 0, 0),
    ("filet.collect.together.Together._sums", 1, 1),  # of the data to keep
    ("filet.distributed.group.torch.empty", 0, 1),
    ("filet.distributed.group.torch.empty", 1, 0),
    ("filet.distributed.group._as_tensor", 1, 1),
    ("filet.distributed.group._pickled", 0, 12),
    ("filet.distributed.group.pickle.loads", 1, 0),
    ("filet.blockwise.work.moments_of_all", 1, 1),
    ("filet.blockwise.work.choose", 0, 1),
    ("filet.blockwise.journal.Journal.save_statistics", 1, 1),
    ("filet.blockwise.journal.Journal.save_block", 1, 1),
    ("filet.blockwise.journal.Journal._write_block", 0, 1),
    ("filet.blockwise.journal.Journal._write_gradient", 1, 0),
    ("filet.blockwise.stream.torch.empty", 1, 5),
    ("filet.blockwise.stream.Loading._fill_place", 1, 3),
]
IN_MEMORY = [
    ("filet.distributed.exchange._packed", 1, 1),
    ("filet.distributed.exchange._place", 0, 1),
    ("filet.distributed.exchange.torch.cat", 0, 0),
    ("filet.distributed.exchange.torch.empty", 1, 4),
    ("filet.distributed.exchange._divided", 1, 0),
    ("filet.select.choose", 0, 0),
    ("filet.distributed.group._pickled", 0, 0),
]


class Stand:
    """A module in whose place one of its functions fails."""

    def __init__(self, module: Any, name: str, function: Any) -> None:
        self._module = module
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def break_(patch: pytest.MonkeyPatch, point: str, calls: int) -> None:
    """Have the function raise once, after that many calls."""
    count = 0

    def failing(function: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == calls + 1:
                raise OSError(f"no room at {point}")
            return function(*args, **more)

        return counted

    place, name = point.rsplit(".", 1)
    module = next((each for each in (".torch", ".pickle") if place.endswith(each)), "")
    if module:
        its = __import__(module[1:])
        patch.setattr(place, Stand(its, name, failing(getattr(its, name))))
    else:
        from _pytest.monkeypatch import resolve

        patch.setattr(point, failing(resolve(point)))


def blockwise(rank: int, folder: Path, model: Path) -> None:
    FiletReport.plot = lambda report, path: Path(path).touch()  # type: ignore[method-assign]
    samples = models._text(1)
    initialize(
        model, folder / "out", batches=list(models.loader(samples[rank::2], 3)),
        config=FiletConfig(samples=None), keep=kept()[rank::2], overwrite=True,
        save_statistics=folder / "statistics.safetensors",
    )  # fmt: skip


def in_memory(rank: int, folder: Path, model: Path) -> None:
    filet.initialize_lora_filet_weights(
        peft_of(case("llama")), list(loader(case("llama").samples[rank::2], 3)),
        FiletConfig(samples=None, start="untouched"), show_progress_bar=False,
    )  # fmt: skip


def broken(rank: int, folder: Path, model: Path, points: Any, call: Any) -> list[str]:
    """What is said where each point fails; the processes go on, and succeed in the end."""
    said = []
    for point, where, calls in points:
        dist.barrier()
        if rank == 0:  # each begins anew
            shutil.rmtree(folder / "out.filet-run", ignore_errors=True)
        dist.barrier()
        with pytest.MonkeyPatch.context() as patch:
            if rank == where:
                break_(patch, point, calls)
            try:
                call(rank, folder, model)
                said.append("nothing was raised")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        (folder / f"said{rank}").write_text("\n".join(said))
    call(rank, folder, model)
    return said


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    model, found = model_folder("gpt2"), {}
    for points, call in ((BLOCKWISE, blockwise), (IN_MEMORY, in_memory)):
        folder = tmp_path_factory.mktemp("ranks")
        try:
            found[call.__name__] = values(run(2, broken, folder, model, points, call))
        except AssertionError as error:
            last = [(folder / f"said{rank}").read_text().splitlines()[-1:] for rank in (0, 1)]
            raise AssertionError(f"{error}, after {last}") from error
    return found


@pytest.mark.parametrize(
    ("call", "number"),
    [("blockwise", n) for n in range(len(BLOCKWISE))]
    + [("in_memory", n) for n in range(len(IN_MEMORY))],
    ids=[f"{each[0][6:]} of {each[1]}" for each in BLOCKWISE]
    + [f"in memory {each[0][6:]} of {each[1]}" for each in IN_MEMORY],
)
def test_all_end_with_its_message(call: str, number: int, both: Any) -> None:
    point, where, _ = (BLOCKWISE if call == "blockwise" else IN_MEMORY)[number]
    raised, heard = both[call][where][number], both[call][1 - where][number]
    assert raised == f"OSError: no room at {point}"
    assert heard == f"OSError: rank {where}: no room at {point}"
