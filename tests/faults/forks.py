"""Runs pytest in copies of the project, in forks of a process that has imported other projects.

To import torch, transformers and PEFT takes longer than most tests. The process that forks imports
nothing of fastlora and of `tests`; a fork imports both from its copy.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import NoReturn

IMPORTS = (
    "pytest",
    "torch",
    "triton",
    "transformers.models.llama.modeling_llama",
    "peft",
    "safetensors.torch",
)
# As in `tests/conftest.py`, which comes too late: libraries read these when they are imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # which takes a second to import
    "FASTLORA_CASES": "all",
}


class Forks:
    """The process that forks, as seen from the one that has started it.

    Args:
        address: Path of its socket.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def pytest(
        self, folder: Path, arguments: Sequence[str], limit: float
    ) -> tuple[int | None, str]:
        """Runs pytest in a fork.

        Args:
            folder: The copy of the project.
            arguments: Pytest's.
            limit: Seconds, after which the fork and what it has started are killed.

        Returns:
            The exit code, minus a signal, or None after the limit; and what was printed.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            with Client(self._address) as connection:
                connection.send((str(folder), tuple(arguments), output.name))
                group = connection.recv()
                code = connection.recv() if connection.poll(limit) else None
                if code is None:
                    os.killpg(group, signal.SIGKILL)
            return code, output.read()


@contextlib.contextmanager
def forks(environment: Mapping[str, str], imports: Sequence[str] = IMPORTS) -> Iterator[Forks]:
    """Starts a process that imports and forks, and ends it with the block."""
    own = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryDirectory(prefix="fastlora-forks-") as scratch,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, __file__, f"{scratch}/socket", *imports],
            env={**own, **ENVIRONMENT, **environment},
            stdin=subprocess.PIPE,  # its end tells the process that this one has ended
            stdout=subprocess.PIPE,
            stderr=errors,  # where imports warn
        ) as process,
    ):
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            errors.seek(0)
            raise RuntimeError(f"{__file__} does not start: {errors.read()}")
        yield Forks(f"{scratch}/socket")


def _serve(address: str, imports: Sequence[str]) -> NoReturn:
    """Imports, and forks for each connection until standard input ends, and kills the forks."""
    for name in imports:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    watches: set[int] = set()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        os.write(sys.stdout.fileno(), b"ready\n")
        while sys.stdin not in select.select([sys.stdin, server], [], [])[0]:
            with Connection(server.accept()[0].detach()) as connection:
                watch = os.fork()
                if watch == 0:
                    _watch(connection)
            watches.add(watch)
            # Waited for, so that their time counts as this process's.
            watches -= {each for each in watches if os.waitpid(each, os.WNOHANG)[0]}
    for watch in watches:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(watch, signal.SIGKILL)
        os.waitpid(watch, 0)
    os._exit(0)


def _watch(connection: Connection) -> NoReturn:
    """Reports how a fork of this fork ends."""
    os.setsid()
    folder, arguments, output = connection.recv()
    connection.send(os.getpid())
    child = os.fork()
    if child == 0:
        _run(folder, arguments, output)
    connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _run(folder: str, arguments: Sequence[str], output: str) -> NoReturn:
    """Runs pytest in a copy of the project, as `python -m pytest` does."""
    import pytest

    nothing, printed = os.open(os.devnull, os.O_RDWR), os.open(output, os.O_WRONLY)
    for stream, target in ((0, nothing), (1, printed), (2, printed)):
        os.dup2(target, stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    sys.path[0] = folder
    code = pytest.main([*arguments])
    sys.stdout.flush()
    # To collect all of what was imported takes a second; what is not collected some libraries list.
    gc.freeze()
    for stream in (1, 2):
        os.dup2(nothing, stream)
    sys.exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
