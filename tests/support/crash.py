"""Kills a process at one of its calls that change files below a folder.

    python -m tests.support.crash --below FOLDER --at 12 -- -m fastlora train run.toml

Counted are: opening a file for writing, mkdir, rename and replace, remove, rmdir, truncate, link
and symlink (Python's audit events), each fsync, and the beginning, the middle and the end of each
file that safetensors writes (its Rust code opens ``.tmp*`` beside the file, writes it, and renames
it; the stand-in here does the same in three steps). The process is killed before the call. A file
of new content that has not been flushed by fsync may then have lost any part of its end, as after
a power failure: it is cut at random, under whatever name it has. What is appended to a file that
exists is not cut. Not covered are renames that a power failure undoes.

Needs Linux (``/proc/self/fd``, fork) and no privileges.
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATHS = {  # audit event -> positions of (path, dir_fd) pairs
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}


class Crash:
    """Counts this process's changes of files below a folder, and kills it at one of them.

    Nothing disarms it: use it in a process of its own.

    Args:
        below: The folder.
        at: Number of the change, from 1; 0 only counts.
        seed: Decides which files lose their end.
        note: Called with a description of each change.
    """

    def __init__(
        self, below: Path, at: int, seed: int = 0, note: Callable[[str], None] | None = None
    ) -> None:
        self._below, self._at, self._note = below.resolve(), at, note
        self._random = random.Random(seed)
        self._count = 0
        self._unflushed: set[Path] = set()
        self._within = False

    def arm(self) -> None:
        """Starts to count."""
        import safetensors.torch

        sys.addaudithook(self._audit)
        self._fsync, os.fsync = os.fsync, self._flush
        self._serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._write_tensors

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if self._within:
            return
        if event == "open":
            path, _, flags = given
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            changed = [_absolute(path, None)]
            self._change(event, changed)
            if flags & (os.O_TRUNC | os.O_EXCL):
                self._unflushed.add(changed[0])
        elif event in _PATHS:
            changed = [
                _absolute(given[path], None if at is None else given[at])
                for path, at in _PATHS[event]
            ]
            self._change(event, changed)
            if event == "os.rename":
                self._move(*changed)
            elif event == "os.remove":
                self._unflushed.discard(changed[0])

    def _flush(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._change("fsync", [path])
        self._fsync(descriptor)
        self._unflushed.discard(path)

    def _write_tensors(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        path = _absolute(filename, None)
        self._change("begin", [path])
        partial = path.with_name(".tmpCrash")
        self._within = True
        self._serialize(tensors, partial, metadata)
        self._within = False
        self._unflushed.add(partial)
        self._change("middle", [partial])
        os.replace(partial, path)

    def _change(self, event: str, paths: list[Path]) -> None:
        if not any(self._below == path or self._below in path.parents for path in paths):
            return
        self._count += 1
        if self._note is not None:
            self._note(f"{event} {' '.join(path.name for path in paths)}")
        if self._count == self._at:
            self._within = True
            for path in sorted(self._unflushed):
                if path.is_file() and self._random.random() < 0.5:
                    os.truncate(path, self._random.randrange(path.stat().st_size + 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def _move(self, old: Path, new: Path) -> None:
        for path in list(self._unflushed):
            if path == old or old in path.parents:
                self._unflushed.remove(path)
                self._unflushed.add(new / path.relative_to(old))


def changes(action: Callable[[], None], below: Path) -> list[str]:
    """Runs an action in a forked process; returns its changes of files below a folder, in order."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as lines:
        child = _fork(action, below, 0, 0, lambda line: os.write(writing, f"{line}\n".encode()))
        os.close(writing)
        found = lines.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0, found
    return found


def kill(action: Callable[[], None], below: Path, at: int, seed: int = 0) -> None:
    """Runs an action in a forked process and kills it at a change; see `Crash`."""
    status = os.waitpid(_fork(action, below, at, seed, None), 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (at, status)


def _fork(
    action: Callable[[], None], below: Path, at: int, seed: int, note: Callable[[str], Any] | None
) -> int:
    child = os.fork()
    if child:
        return child
    try:
        Crash(below, at, seed, note).arm()
        action()
        os._exit(0)
    finally:
        os._exit(1)


def _absolute(path: Any, folder: int | None) -> Path:
    if isinstance(path, int):  # a descriptor
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    at = Path.cwd() if folder in (None, -1) else Path(os.readlink(f"/proc/self/fd/{folder}"))
    return Path(os.path.normpath(at / os.fsdecode(path)))


def main() -> None:
    """Runs a module or a script under a `Crash`, as the module's docstring shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--below", type=Path, required=True)
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changes", type=Path, help="write a line for each change into this file")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    note = None
    if args.changes is not None:
        lines = args.changes.open("w", buffering=1)
        note = lambda line: print(line, file=lines)  # noqa: E731, T201
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    Crash(args.below, args.at, args.seed, note).arm()
    if is_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
