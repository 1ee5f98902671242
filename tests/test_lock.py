"""A folder that is locked, removed and made again, by several at once."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from filet.system import lock
from filet.system.lock import FolderLock

# Two descriptors of one process contend as those of two processes do: a lock belongs to what was
# opened.


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with FolderLock(folder):
        (folder / "mine").touch()
        with pytest.raises(ValueError, match="folder is in use by another process; expected one"):
            FolderLock(folder).__enter__()
    with FolderLock(folder):
        assert (folder / "mine").exists()
    with pytest.raises(KeyboardInterrupt), FolderLock(folder):
        raise KeyboardInterrupt
    with FolderLock(folder) as held:
        held.remove()
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_removed_as_a_whole_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed while it deletes leaves nothing that looks like a folder in use."""
    folder = tmp_path / "folder"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lock.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), FolderLock(folder) as held:
        (folder / "mine").touch()
        held.remove()
    assert not folder.exists()
    monkeypatch.undo()
    with FolderLock(folder):
        assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("then", ["mkdir", "flock"])
def test_the_folder_goes_while_another_is_about_to_lock_it(
    then: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made, or its file opened, when the holder removes it; a third may even make another.

    The second gets a folder that is there, under a lock that others see, or waits its turn.
    """
    folder = tmp_path / "folder"
    module = {"mkdir": os, "flock": fcntl}[then]
    plain = getattr(module, then)
    first = FolderLock(folder).__enter__()
    third = FolderLock(folder)

    def late(subject: Any, *args: Any) -> None:
        if then == "mkdir" and subject != folder:  # its parent
            return plain(subject, *args)
        monkeypatch.undo()
        if then == "mkdir":
            with pytest.raises(FileExistsError):
                plain(subject, *args)
        first.remove()
        first.__exit__()
        if again:
            third.__enter__()
            (folder / "theirs").touch()
        if then == "flock":
            plain(subject, *args)

    monkeypatch.setattr(module, then, late)
    second = FolderLock(folder)
    if again:
        with pytest.raises(ValueError, match="in use"):
            second.__enter__()
        assert (folder / "theirs").exists()
        third.__exit__()
    with second if not again else third:
        assert (folder / "lock").exists()
        with pytest.raises(ValueError, match="in use"):
            FolderLock(folder).__enter__()
        assert (folder / "theirs").exists() == again


def test_a_link_stays(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        with FolderLock(link) as held:
            (link / "mine").touch()
            with pytest.raises(ValueError, match="in use"):
                FolderLock(tmp_path / "elsewhere").__enter__()
            held.remove()
        assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        FolderLock(tmp_path / "file").__enter__()


def contend(folder: Path, rounds: int) -> None:
    """Have the folder alone, so many times, and remove it every other time."""
    name = str(os.getpid())
    while rounds:
        try:
            with FolderLock(folder) as held:
                # Fails where another is in it.
                handle = os.open(folder / "owner", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(handle, name.encode())
                os.close(handle)
                os.sched_yield()
                assert (folder / "owner").read_text() == name
                if rounds % 2:
                    held.remove()
                else:
                    (folder / "owner").unlink()
                rounds -= 1
        except ValueError:
            os.sched_yield()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_that_remove_what_others_want(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=contend, args=(tmp_path / "f", 150)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {path.name for path in tmp_path.iterdir()} <= {"f"}
