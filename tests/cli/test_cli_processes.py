"""The commands in two processes, as torchrun starts them, beside one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_cases import adapter_weights, arguments, error_of, sentence
from torch.distributed.run import get_args_parser

import filet
from filet import FiletReport
from filet.cli.arguments import make_parser
from filet.cli.main import main
from ranks import run, values


@pytest.fixture(autouse=True)
def no_network() -> None:
    """The processes of a test find each other by connections of this machine."""


def command(rank: int, folder: Path, argv: list[str], port: int, die: bool = False) -> Any:
    """A command that finds the others itself; its status, and what it said on both streams."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if die and rank:
        filet.estimate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    return status, out.getvalue(), err.getvalue(), dist.is_initialized()


@pytest.mark.parametrize("name", ["init", "stats"])
def test_torchrun_leaves_the_options_to_the_command(name: str) -> None:
    """It reads those of the command too, and fails where one begins several of its own."""
    command = make_parser()._subparsers._group_actions[0].choices[name]  # type: ignore
    for option in command._option_string_actions:
        before = [] if option != "--start" else ["--"]  # docs/distributed.md
        argv = ["-m", *before, "filet.cli", name, option, "value"]
        parsed = get_args_parser().parse_args(argv)
        assert [parsed.training_script, *parsed.training_script_args] == argv[-4:]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def said_once(ranks: list[Any]) -> str:
    """The one error of all processes, which the first one says for them."""
    assert [status for status, *_ in ranks] == [1, 1], ranks
    assert ranks[0][2].count("filet: error: ") == 1 and "error" not in ranks[1][2]
    return str(ranks[0][2])


@pytest.mark.parametrize(
    ("keep", "engine"), [(False, "memory"), (True, "memory"), (False, "blockwise")]
)
def test_init_in_two_processes(
    keep: bool, engine: str, init: list[str], data: Path, tmp_path: Path, port: int
) -> None:
    argv = [*init, "--save-statistics", str(tmp_path / "statistics.safetensors")]
    argv += ["--keep", str(data)] if keep else []
    argv += ["--engine", engine]
    ranks = values(run(2, command, tmp_path, argv, port, join=False))
    assert [status for status, *_ in ranks] == [0, 0], ranks
    assert not any(again for *_, again in ranks)
    assert "written" in ranks[0][1] and not ranks[1][1] and not ranks[1][2]
    many = tmp_path / "out" / "adapter"
    os.rename(many, tmp_path / "many")
    assert main([*argv, "--overwrite"]) == 0
    reports = [FiletReport.load(folder) for folder in (tmp_path / "many", many)]
    assert reports[0].samples == reports[1].samples == 24
    assert reports[0].tokens == reports[1].tokens
    for name, module in reports[1].modules.items():
        other = reports[0].modules[name]
        torch.testing.assert_close(other.energies, module.energies, rtol=1e-5, atol=0)
        assert torch.equal(other.indices, module.indices)
    one, two = adapter_weights(tmp_path / "many"), adapter_weights(many)
    for key, value in two.items():
        torch.testing.assert_close(one[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_the_draw_is_split(streaming: bool, init: list[str], tmp_path: Path, port: int) -> None:
    """Nine of 24 rows drawn by a seed, the same in both processes, five for one and four for it."""
    drawn = tmp_path / "drawn.jsonl"
    rows = [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(24)]
    drawn.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*init, "--data", str(drawn), "--samples", "9", "--seed", "5", "--max-length", "24"]
    argv += ["--streaming"] if streaming else []
    ranks = values(run(2, command, tmp_path, argv, port, join=False))
    assert [status for status, *_ in ranks] == [0, 0], ranks
    many = FiletReport.load(tmp_path / "out" / "adapter")
    assert main([*argv, "--overwrite"]) == 0
    one = FiletReport.load(tmp_path / "out" / "adapter")
    assert many.samples == one.samples == 9
    assert (many.tokens, many.loss_terms) == (one.tokens, one.loss_terms)
    for name, module in one.modules.items():
        torch.testing.assert_close(many.modules[name].energies, module.energies, rtol=1e-5, atol=0)
    assert main([*argv, "--overwrite", "--seed", "6"]) == 0
    other = FiletReport.load(tmp_path / "out" / "adapter")
    assert other.tokens != one.tokens  # so the seed is what was compared


@pytest.mark.parametrize("option", ["--data", "--keep"])
def test_data_that_differ_are_refused(
    option: str, init: list[str], data: Path, tmp_path: Path, port: int
) -> None:
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        lines = data.read_text().splitlines(keepends=True)
        (folder / "own.jsonl").write_text("".join(lines[rank:]))
    ranks = values(run(2, command_in_own_folder, tmp_path, init, option, folders, port, join=False))
    assert f"what was drawn of {option}" in said_once(ranks)
    assert not (tmp_path / "out" / "adapter").exists()


def command_in_own_folder(
    rank: int, folder: Path, argv: list[str], option: str, folders: list[Path], port: int
) -> Any:
    """Each process has a file of the same name in a folder of its own, as on two machines."""
    os.chdir(folders[rank])
    return command(rank, folder, [*argv, option, "own.jsonl"], port)


def test_stats_in_two_processes(stats: list[str], data: Path, tmp_path: Path, port: int) -> None:
    argv = [*stats, "--data", str(data), "--output", str(tmp_path / "many.safetensors")]
    ranks = values(run(2, command, tmp_path, argv, port, join=False))
    assert [status for status, *_ in ranks] == [0, 0]
    assert main([*argv[:-1], str(tmp_path / "one.safetensors")]) == 0
    many, one = (filet.Statistics.load(tmp_path / f"{n}.safetensors") for n in ("many", "one"))
    assert (many.samples, many.tokens, many.loss_terms) == (one.samples, one.tokens, one.loss_terms)
    for name, its in one.moments.items():
        largest = float(its.output.sum.abs().max())
        torch.testing.assert_close(
            many.moments[name].output.sum, its.output.sum, rtol=1e-5, atol=1e-6 * largest
        )


def test_errors_in_two_processes(init: list[str], data: Path, tmp_path: Path, port: int) -> None:
    assert main(init) == 0
    folder = tmp_path / "out" / "adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ranks = values(
        run(2, command, tmp_path, [*init, "--overwrite", "--rank", "99"], port, join=False)
    )
    assert "rank 99 exceeds" in said_once(ranks)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def command_that_fails(rank: int, folder: Path, argv: list[str], errors: Any, port: int) -> Any:
    """Each process raises an error of its own as it looks at the model, or none."""
    import filet.cli.commands as commands

    check = commands.check_model

    def failing(args: Any) -> None:
        check(args)
        if errors[rank] is not None:
            raise errors[rank]

    commands.check_model = failing
    return command(rank, folder, argv, port)


FAILURES: dict[str, tuple[list[Exception | None], list[str]]] = {
    "first": ([ValueError("a  hole"), None], ["rank 0: a hole", ""]),
    "second": ([None, ValueError("a hole")], ["", "rank 1: a hole"]),
    # What others hear of it is in other words.
    "of a file": (
        [None, FileNotFoundError(2, "Not there", "x.txt")], ["", "rank 1: x.txt: Not there"]
    ),
    "same": ([ValueError("a hole"), ValueError("a hole")], ["a hole", ""]),
    "different": ([ValueError("a"), OSError("b")], ["rank 0: a", "rank 1: b"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_is_said_once(kind: str, init: list[str], tmp_path: Path, port: int) -> None:
    """By who had it, of several the first; the others end with the same status."""
    errors, expected = FAILURES[kind]
    ranks = values(run(2, command_that_fails, tmp_path, init, errors, port, join=False))
    assert [status for status, *_ in ranks] == [1, 1]
    lines = [f"filet: error: {text}\n" if text else "" for text in expected]
    assert [said for _, _, said, _ in ranks] == lines


def test_torchrun_cuts_no_error_off(init: list[str], tmp_path: Path) -> None:
    """It ends the other processes with the first that ends."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"wrong": 1}')
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = [*program, "-m", "filet.cli", *init, "--data", str(wrong)]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'python'}:{root}"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("filet: error: ")]
    assert len(lines) == 1 and "no known columns" in lines[0]


def test_a_bug_of_one_process_is_raised_in_all(init: list[str], tmp_path: Path, port: int) -> None:
    """It has a traceback, which a launcher would cut off if another process ended quietly."""
    errors = [None, KeyError("a bug")]
    ended = run(2, command_that_fails, tmp_path, init, errors, port, join=False)
    assert [("a bug" in each.error, each.value) for each in ended] == [(True, None)] * 2


def test_a_process_that_is_killed(init: list[str], tmp_path: Path, port: int) -> None:
    assert main(init) == 0
    folder = tmp_path / "out" / "adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = run(2, command_alone, tmp_path, [*init, "--overwrite"], port, join=False)
    assert ended[1].exitcode == -signal.SIGKILL
    status, _, said, _ = ended[0].value
    assert status == 1 and "lost another process" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def short_of_memory(rank: int, folder: Path, argv: list[str], port: int) -> Any:
    """The second rank has no memory for batches of more than six samples."""
    import filet.collect.run as passes

    through = passes._Run.through

    def limited(self: Any, prepared: Any) -> int:
        if rank and prepared.samples > 6:
            raise filet.OutOfMemoryError("no room", "pass", "2.00 GiB")
        return through(self, prepared)

    passes._Run.through = limited  # type: ignore[method-assign]
    return command(rank, folder, argv, port)


def test_all_start_again_in_smaller_batches(init: list[str], tmp_path: Path, port: int) -> None:
    argv = [*init, "--batch-size", "auto"]
    (status, out, err, _), (other, *_) = values(
        run(2, short_of_memory, tmp_path, argv, port, join=False)
    )
    assert (status, other) == (0, 0), err
    assert "rank 1: no room. Starting again with --batch-size" in err
    assert out.count("padding ") == 2  # once a try
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def command_alone(rank: int, folder: Path, argv: list[str], port: int) -> Any:
    return command(rank, folder, argv, port, die=True)


def test_a_set_of_statistics(stats: list[str], data: Path, tmp_path: Path, port: int) -> None:
    """Written by two processes; taken wherever a file of statistics is."""
    many, one = tmp_path / "many.safetensors", tmp_path / "one.safetensors"
    argv = [*stats, "--data", str(data), "--output"]
    ranks = values(run(2, command, tmp_path, [*argv, str(many)], port, join=False))
    assert [status for status, *_ in ranks] == [0, 0]
    index = tmp_path / "many.safetensors.index.json"
    names = {path.name for path in tmp_path.iterdir()}
    assert index.name in names and many.name not in names
    assert main([*argv, str(one)]) == 0
    model = argv[argv.index("--model") + 1]
    sources = (many, index, one)
    folders = [tmp_path / f"adapter{number}" for number in range(3)]
    for source, folder in zip(sources, folders, strict=True):
        applied = ["init", "--model", model, "--statistics", str(source), "--output", str(folder)]
        assert main([*applied, "--rank", "2", "--no-progress"]) == 0
    again = [*applied[:3], "--statistics", str(many), "--output", str(tmp_path / "again")]
    ranks = values(run(2, command, tmp_path, [*again, "--rank", "2"], port, join=False))
    assert [status for status, *_ in ranks] == [0, 0]
    reports = [FiletReport.load(folder) for folder in (*folders, tmp_path / "again")]
    for name, module in reports[0].modules.items():
        assert all(torch.equal(its.modules[name].indices, module.indices) for its in reports)
    assert main(["inspect", str(many), str(index)]) == 0
    merged = tmp_path / "merged.safetensors"
    assert main(["stats", "--merge", str(many), str(one), "--output", str(merged)]) == 0
    assert filet.Statistics.load(merged).samples == 48


def test_a_set_of_statistics_is_kept_unless_told(
    stats: list[str],
    data: Path,
    tmp_path: Path,
    port: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "s.safetensors"
    index = tmp_path / "s.safetensors.index.json"
    index.write_text("precious")
    argv = [*stats, "--data", str(data), "--output", str(output)]
    assert f"{index} exists; --overwrite replaces it" in error_of(capsys, argv)
    merge = arguments("stats", "--merge", output, index, "--output", output, "--overwrite")
    assert "is also read" in error_of(capsys, merge)
    assert index.read_text() == "precious"


def command_without_a_disk(rank: int, folder: Path, argv: list[str], port: int) -> Any:
    """The second process does not see what the first one writes, and no model is run."""
    is_dir = Path.is_dir
    if rank:
        Path.is_dir = lambda self: not self.name.startswith(".s") and is_dir(self)  # type: ignore
    filet.collect_statistics = None  # type: ignore
    return command(rank, folder, argv, port)


@pytest.mark.parametrize("name", ["stats", "init"])
def test_disks_that_are_not_shared_are_found_before_the_pass(
    name: str, init: list[str], stats: list[str], data: Path, tmp_path: Path, port: int
) -> None:
    path = tmp_path / "new" / "s.safetensors"
    argv = [*stats, "--data", str(data), "--output", str(path)]
    if name == "init":
        argv = [*init, "--save-statistics", str(path)]
    ranks = values(run(2, command_without_a_disk, tmp_path, argv, port, join=False))
    assert "rank 1 does not see what rank 0 writes beside it" in said_once(ranks)
    assert not path.parent.exists() and not [*tmp_path.glob(".s*")]
