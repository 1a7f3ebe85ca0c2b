"""What a killed writer leaves, who removes it, and what is on disk before a rename."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from fastlora.model import atomic_files
from fastlora.model.atomic_files import (
    acquire_flock,
    atomic_new_folder,
    atomic_remove_folder,
    atomic_replace_file,
    folder_lock,
    remove_abandoned_temp_folders,
)
from tests.support import crash

linux = pytest.mark.skipif(sys.platform != "linux", reason="tests.support.crash needs it")
FOREIGN = (".log.jsonl.tmp", ".log.jsonl.mine.tmp", ".x.0123-1.tmp")


def write(path: Path, text: str) -> None:
    with atomic_replace_file(path) as partial:
        partial.write_text(text)


def leave(path: Path, seed: int) -> Path:
    """Kills a writer of ``path`` before its rename; returns the temporary folder that it leaves."""
    before = set(path.parent.iterdir())
    names = crash.changes(lambda: write(path, "new"), path.parent)
    at = next(i for i, name in enumerate(names, 1) if name.startswith("os.rename"))
    crash.kill(lambda: write(path, "half"), path.parent, at, seed)
    (left,) = set(path.parent.iterdir()) - before - {path}
    return left


@linux
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_every_kill(tmp_path: Path, kind: str) -> None:
    """R6: a writer that is killed at any call leaves the old or the new one; the next removes all.

    What a kill leaves is removed by a writer of any other name in the folder, too.
    """
    target = tmp_path / "log.jsonl" if kind == "file" else tmp_path / "step-1"
    for name in FOREIGN:
        (tmp_path / name).write_text("")

    def action() -> None:
        if kind == "file":
            write(target, "new")
        else:
            with atomic_new_folder(target) as partial:
                (partial / "inner").mkdir()
                (partial / "inner" / "a").write_text("new")

    def reset() -> None:
        if kind == "file":
            write(target, "old")
        elif target.exists():
            atomic_remove_folder(target)

    reset()
    for at in range(1, 1 + len(crash.changes(action, tmp_path))):
        reset()
        crash.kill(action, tmp_path, at, seed=at)
        if kind == "file":
            assert target.read_text() in ("old", "new")
        elif target.exists():
            assert (target / "inner" / "a").read_text() == "new"
        write(tmp_path / "another", "")
        left = {path.name for path in tmp_path.iterdir()} - {target.name}
        assert left == {"another", *FOREIGN}, at


@linux
def test_order_on_disk(tmp_path: Path) -> None:
    """R2: fsync of the file before the rename, fsync of the folder behind it."""
    found = crash.changes(lambda: write(tmp_path / "a", "new"), tmp_path)
    order = [name for name in found if name.startswith(("fsync", "os.rename"))]
    assert order == ["fsync new-a", "os.rename new-a a", f"fsync {tmp_path.name}"]

    def fill() -> None:
        with atomic_new_folder(tmp_path / "b") as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "c").write_text("new")

    found = crash.changes(fill, tmp_path)
    order = [name for name in found if name.startswith(("fsync", "os.rename"))]
    assert order[-2:] == ["os.rename new b", f"fsync {tmp_path.name}"]
    assert sorted(order[:-2]) == ["fsync c", "fsync inner", "fsync new"]


def test_files_of_a_living_writer_stay(tmp_path: Path) -> None:
    """R6: other writers, of the same name, too, remove nothing that a living one still writes."""
    with (
        atomic_replace_file(tmp_path / "a") as partial,
        atomic_new_folder(tmp_path / "b") as folder,
    ):
        partial.write_text("mine")
        (folder / "c").write_text("mine")
        write(tmp_path / "a", "theirs")
        write(tmp_path / "b.txt", "theirs")
        remove_abandoned_temp_folders(tmp_path)
        assert (partial.read_text(), (tmp_path / "a").read_text()) == ("mine", "theirs")
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "b.txt"}


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    for action in (atomic_replace_file, atomic_new_folder):
        with pytest.raises(RuntimeError), action(tmp_path / "a") as partial:
            (partial / "b" if partial.is_dir() else partial).write_text("half")
            raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@linux
def test_without_flock_the_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: on a file system without flock, the writer's process tells, and only on its own host."""
    dead = leave(tmp_path / "a", 1)
    elsewhere = dead.with_name(dead.name.replace(atomic_files._host_name_digest(), "0" * 8))
    unowned = dead.with_name(dead.name.replace("a", "b", 1))
    unowned.mkdir()

    def raise_error(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic_files.fcntl, "flock", raise_error)
    with folder_lock(tmp_path), atomic_replace_file(tmp_path / "a") as partial:
        partial.write_text("mine")
        assert not dead.exists()
        write(tmp_path / "c", "theirs")
        assert partial.read_text() == "mine"
        assert acquire_flock(0) is None
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    remove_abandoned_temp_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", elsewhere.name}
    monkeypatch.undo()
    remove_abandoned_temp_folders(tmp_path)
    assert not elsewhere.exists() and not unowned.exists()


def test_without_locks_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: files and folders are replaced all the same."""
    monkeypatch.setattr(atomic_files, "fcntl", None)
    with folder_lock(tmp_path):
        write(tmp_path / "a", "new")
    with atomic_new_folder(tmp_path / "b") as partial:
        (partial / "c").write_text("new")
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_file_system_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
