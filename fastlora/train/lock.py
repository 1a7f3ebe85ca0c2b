"""The lock on the folder of a training run: one run at a time writes into a folder.

It is `flock` on a file, which the system releases when the process ends, however it ends. A forked
process shares the descriptor, and with it the lock. It closes its copy, so that a worker process
that outlives a killed run does not keep the lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastlora.model.replace_files import try_lock
from fastlora.train.log import typed
from fastlora.train.processes import TrainError

LOCK = ".run.lock"
# The descriptors of the locks that this process holds.
_held: set[int] = set()


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, and creates the folder if it is missing.

    The lock file is removed at the end, and so is a folder that was created and is still empty.
    Where the file system has no `flock`, there is a warning and no lock.

    Raises:
        TrainError: Another run holds the lock; the message names its process. Nothing has changed.
    """
    path = folder / LOCK
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        descriptor = _acquire(path)
        try:
            if descriptor is not None:
                with typed(path):
                    _describe_holder(descriptor)
            yield
        finally:
            if descriptor in _held:  # false in a forked process
                path.unlink(missing_ok=True)  # while it is locked: nobody else has this file then
                _held.discard(descriptor)
                os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()


def _acquire(path: Path) -> int | None:
    """Returns a descriptor of the lock file, locked; None where there are no locks."""
    while True:
        with typed(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # a run that ended has just removed its empty folder
                continue
        _held.add(descriptor)
        locked = False
        try:
            free = try_lock(descriptor)
            if free is None:
                path.unlink(missing_ok=True)
                warnings.warn(
                    f"{path.parent}: the file system has no locks; make sure that no other run "
                    "writes into this folder",
                    stacklevel=2,
                )
                return None
            if not free:
                raise TrainError(
                    f"{path.parent}: another training run writes into this folder: "
                    f"{_holder(descriptor)}; wait until it ends, or choose another out folder"
                )
            # A run that ends removes its lock file: what this run locked may have no name anymore.
            locked = _is_at(descriptor, path)
            if locked:
                return descriptor
        finally:
            if not locked:
                _held.discard(descriptor)
                os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int) -> str:
    """Returns what the lock file says about the process that holds the lock."""
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
        return (
            f"pid {found['pid']} on host {found['host']}, started {found['started']}, "
            f"command {found['command']}"
        )
    except (ValueError, KeyError, TypeError):  # it has just begun
        return "its process is not known yet"
