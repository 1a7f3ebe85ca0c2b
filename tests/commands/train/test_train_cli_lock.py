"""The lock on a run's folder."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlora.commands import cli
from fastlora.model import atomic_files
from fastlora.train.lock import LOCK, lock_folder
from fastlora.train.processes import TrainError
from tests.support import train_runs
from tests.support.train_runs import contents, same


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something is true."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_run_in_a_folder(
    fails: Any, given: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R11: a run in a folder that another run uses is refused, and names the other one.

    Commands that only read are not. A killed run holds no lock.
    """
    from tests.support.forked_runs import ForkedRun, WaitInStep

    out, path = tmp_path / "out", train_runs.write_config(tmp_path / "first.json", given)
    waiting = WaitInStep(4, tmp_path / "waits")
    first = ForkedRun(["train", path, "--quiet"], tmp_path / "printed.txt", waiting)
    try:
        wait_for((tmp_path / "waits").exists)
        before = contents(out)
        for flags in ((), ("--resume",)):
            error = fails(given, *flags)
            assert f"{out}: another training run (pid {first.pid} on host " in error
            assert f"pid {first.pid} on host {socket.gethostname()}, started 2" in error
            assert ") is writing to this folder; wait" in error
            assert "command " in error
        assert cli.main(["train", str(path), "--dry-run", "--resume"]) == 0
        assert "2 steps already done" in capsys.readouterr().out
        assert cli.main(["inspect", str(out / "a")]) == 0
        assert contents(out) == before and f"{LOCK}" in before
    finally:
        os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    train_runs.train(path, given, "--resume")
    assert not (out / LOCK).exists()
    whole = train_runs.train(path, given | {"out": str(tmp_path / "whole")})
    assert same(out, whole)


def test_two_processes_are_rejected_together(given: Any, tmp_path: Path) -> None:
    """The process that holds no lock learns of the refusal, and does not wait for the other."""
    from tests.support.forked_runs import processes

    path, out = train_runs.write_config(tmp_path / "c.json", given), tmp_path / "out"
    with lock_folder(out):
        runs = processes(2, ["train", path, "--quiet"], tmp_path)
        assert [run.wait() for run in runs] == [1, 1]
        for run in runs:
            assert f"{out}: another training run (pid {os.getpid()} on host " in run.printed()
        assert [entry.name for entry in out.iterdir()] == [LOCK]
    assert not out.exists()


def test_what_the_lock_says(tmp_path: Path) -> None:
    """The holder is this process, and a folder that was created for the lock is removed."""
    out = tmp_path / "runs" / "first"
    with lock_folder(out):
        holder = json.loads((out / LOCK).read_text())
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        assert holder["command"] == shlex.join(sys.orig_argv)
        with pytest.raises(TrainError, match="another training run"), lock_folder(out):
            pass
        assert (out / LOCK).exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").touch()
    with pytest.raises(TrainError, match="file"), lock_folder(tmp_path / "file"):
        pass


def test_a_lock_file_that_is_left_or_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run's file is taken over. A file that its run has just removed is not the lock."""
    (tmp_path / LOCK).write_text('{"pid": 1')
    acquire_flock, removed = atomic_files.acquire_flock, []

    def removing(descriptor: int) -> bool | None:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return acquire_flock(descriptor)

    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    monkeypatch.setattr("fastlora.train.lock.acquire_flock", removing)
    with lock_folder(tmp_path):
        assert removed and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_worker_process_keeps_no_lock(tmp_path: Path) -> None:
    """A forked worker outlives its killed run: the lock is free. One that ends leaves the lock."""
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        with lock_folder(tmp_path):
            if os.fork() == 0:
                os.write(writing, f"{os.getpid()}\n".encode())
                time.sleep(120)
                os._exit(0)
            time.sleep(120)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        worker = int(file.readline())
        with pytest.raises(TrainError, match=f"pid {run} on host"), lock_folder(tmp_path):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        try:
            with lock_folder(tmp_path):
                os.kill(worker, 0)  # it lives
        finally:
            os.kill(worker, signal.SIGKILL)
    with lock_folder(tmp_path):
        child = os.fork()
        if child == 0:
            with lock_folder(tmp_path / "other"):
                pass
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(TrainError, match=f"pid {os.getpid()} on host"), lock_folder(tmp_path):
            pass


def test_a_child_that_leaves_the_block(tmp_path: Path) -> None:
    """A forked process that ends as a program does keeps the file of its parent's lock."""
    with lock_folder(tmp_path):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert (tmp_path / LOCK).exists()
    if not child:
        os._exit(0 if (tmp_path / LOCK).exists() else 1)


def test_a_file_system_without_locks(given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """There is a warning, and the run goes on."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="out: the file system does not support locks; make"):
        found = train_runs.train(tmp_path / "c.json", given)
    assert found and not (tmp_path / "out" / LOCK).exists()
