"""Runs of `fastlora train` in processes that are forked from one with all imports done.

A process that imports torch, transformers and accelerate takes seconds to start; a fork of it takes
milliseconds. `multiprocessing`'s fork server does the imports of this file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# Imported before the fork.
import accelerate  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from fastlora.commands import cli
from fastlora.train import checkpoint, command  # noqa: F401
from fastlora.train.run import Run

with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg  # noqa: F401

SECONDS = 120


class ForkedRun:
    """``fastlora`` with some arguments, in a process of its own.

    Args:
        arguments: Of the command.
        output: A file for what the command prints.
        prepare: Called in the process before the command.
        env: Environment variables of the process.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        output: Path,
        prepare: Callable[[], object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        given = ([*map(str, arguments)], output, prepare, dict(env or {}))
        self._process: ForkServerProcess = context.Process(target=_run, args=given)
        self._output = output
        self._process.start()

    def wait(self) -> int:
        """Waits for the process; returns its exit code, or minus the signal that killed it."""
        self._process.join(SECONDS)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise AssertionError(f"still runs after {SECONDS} s:\n{self.printed()}")
        return code

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def printed(self) -> str:
        """What the command printed so far."""
        return self._output.read_text()


def _run(
    arguments: list[str], output: Path, prepare: Callable[[], object] | None, env: dict[str, str]
) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(env)
    # A shell's background jobs ignore it, and what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    code = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class SignalInStep:
    """Sends this process signals within a step of its run."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step = step
        self.numbers = numbers

    def __call__(self) -> None:
        do_step = Run._run_training_step

        def interrupted(run: Run) -> None:
            if run.step + 1 == self.step:
                for number in self.numbers:
                    signal.raise_signal(number)
            do_step(run)

        Run._run_training_step = interrupted  # type: ignore[method-assign]


class FullLogInStep:
    """Makes the disk full for the log of a run from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        do_step = Run._run_training_step

        def full(run: Run) -> None:
            if run.step + 1 == self.step and run._log is not None:
                run._log.close()
                run._log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 (as RunLogFile)
            do_step(run)

        Run._run_training_step = full  # type: ignore[method-assign]


class WaitInStep:
    """Makes a run write a file within a step, and wait there until it is killed."""

    def __init__(self, step: int, file: Path) -> None:
        self.step = step
        self.file = file

    def __call__(self) -> None:
        do_step = Run._run_training_step

        def waiting(run: Run) -> None:
            if run.step + 1 == self.step:
                self.file.touch()
                signal.pause()
            do_step(run)

        Run._run_training_step = waiting  # type: ignore[method-assign]


class KillInState:
    """Kills the process of a run in the middle of a checkpoint's ``state.json``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        write_state = checkpoint._write_state

        def killed(folder: Path, state: checkpoint.CheckpointState) -> None:
            if state.step == self.step:
                (folder / "state.json").write_text('{"format": 1, "st')
                os.kill(os.getpid(), signal.SIGKILL)
            write_state(folder, state)

        checkpoint._write_state = killed


def processes(
    count: int, arguments: Sequence[object], folder: Path, prepare: Mapping[int, Any] | None = None
) -> list[ForkedRun]:
    """Starts a run in several processes, as torchrun does; ``prepare`` is by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(count):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        text = {name: str(value) for name, value in env.items()}
        output = folder / f"rank{rank}.txt"
        found.append(ForkedRun(arguments, output, (prepare or {}).get(rank), text))
    return found
