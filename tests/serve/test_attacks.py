"""Attacks on the program, which may open 256 files: others are served, memory and log stay small.

By default each attack lasts for seconds; `make attack` gives them their full length, and a server
of its own to each.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.attacks import ADDRESS, ATTACKS, MOST_SECONDS, REJECTED
from tests.support.served import make_adapter, make_byte_base

FULL = bool(os.environ.get("FASTLORA_ATTACK"))
ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 200 if FULL else 20
HEADER_SECONDS = 10.0
BEGIN_SECONDS = 3.0 if FULL else 1.0  # until connections are open and folders are found
SETTLE_SECONDS = 30.0 if FULL else 0.5
MOST_GROWTH = 100 << 20
BODY = json.dumps({"model": "ash", "prompt": "hi", "max_tokens": 2, "temperature": 0})

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Program:
    """`fastlora serve` in a process that may open 256 files."""

    def __init__(self, root: Path) -> None:
        self.folder, self._log = root / "adapters", root / "stderr"
        self._base = make_byte_base(root / "tiny")
        make_adapter(self.folder / "ash", 0)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts the server if it does not run; what fails inside leaves none."""
        self._start()
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "fastlora", "serve", self._base, "--port", "0", "--cpu"]
        command += ["--adapters", self.folder, "--watch", "0.2", "--drain", "5"]
        command += ["--header-timeout", HEADER_SECONDS, "--max-length", "128"]
        limited = ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *map(str, command)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(limited, stderr=log, env=environment)
        end = time.monotonic() + 120
        while "ready at" not in self.log:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)
        line = next(line for line in self.log.splitlines() if "ready at" in line)
        self.port = int(line.rpartition(":")[2].partition("/")[0])
        for _ in range(5):
            ask(self.port)

    @property
    def log(self) -> str:
        """What the server wrote."""
        return self._log.read_text(errors="replace")

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize()

    def terminate(self) -> float:
        """Sends SIGTERM; returns the seconds to the end, which must be a success."""
        assert self._process is not None
        start = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0, self.log
        return time.monotonic() - start

    def kill(self) -> None:
        """Ends the server if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The server, which a test starts."""
    for library in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(library, reason="the server needs it")
    found = Program(tmp_path_factory.mktemp("attacks"))
    try:
        yield found
    finally:
        found.kill()


def ask(port: int, connection: http.client.HTTPConnection | None = None) -> float:
    """Sends a request over a connection, or over one of its own; returns its seconds."""
    start = time.monotonic()
    used = connection or http.client.HTTPConnection(ADDRESS, port, timeout=30)
    used.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
    answer = used.getresponse()
    text = answer.read()
    assert answer.status == 200, text
    if connection is None:
        used.close()
    return time.monotonic() - start


def ask_often(port: int) -> tuple[list[float], list[float]]:
    """Returns sorted seconds of requests with a new connection each, and over an open one."""
    own = http.client.HTTPConnection(ADDRESS, port, timeout=30)
    new, kept = [], []
    with contextlib.closing(own):
        for _ in range(REQUESTS):
            new.append(ask(port))
            kept.append(ask(port, own))
    return sorted(new), sorted(kept)


@contextlib.contextmanager
def attacking(program: Program, name: str) -> Iterator[list[tuple[str, int]]]:
    """Attacks in a process of its own; yields models and statuses, which are known at the end."""
    command = [sys.executable, ROOT / "tests" / "support" / "attacks.py", name]
    statuses: list[tuple[str, int]] = []
    attack = subprocess.Popen(
        [*map(str, command), str(program.port), str(program.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        time.sleep(BEGIN_SECONDS)
        assert attack.poll() is None
        yield statuses
        output, _ = attack.communicate(timeout=MOST_SECONDS)  # which closes its input
        statuses += [(model, status) for model, status in json.loads(output)]
    finally:
        attack.kill()
        attack.wait()


def within(found: list[float], before: list[float]) -> bool:
    """Whether the median and the 99th percentile over an open connection are near those before."""
    middle, last = statistics.median(before), before[int(0.99 * len(before))]
    return statistics.median(found) <= max(2 * middle, middle + 0.05) and found[
        int(0.99 * len(found))
    ] <= max(4 * last, last + 0.05)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_served(program: Program, name: str) -> None:
    """E1 to E6, E11: clients beside an attack are answered in time, and the attack leaves nothing.

    Where the machine itself is slow, requests are measured up to three times.
    """
    with program.running():
        memory = program.resident
        before_new, before_kept = ask_often(program.port)
        measured: list[Any] = []
        with attacking(program, name) as statuses:
            for _ in range(3):
                new, kept = ask_often(program.port)
                assert new[-1] <= HEADER_SECONDS + 2 * before_new[-1]
                measured.append((kept[len(kept) // 2], kept[-1]))
                if within(kept, before_kept):
                    break
            else:
                raise AssertionError(
                    (measured, before_kept[len(before_kept) // 2], before_kept[-1])
                )
        found = {status for _, status in statuses}
        assert 0 not in found, "a request was not answered"
        assert not {status for status in found if status >= 500}
        if name == "long_prompts":
            assert found and 200 not in found
        rejected = {(model, status) for model, status in statuses if model.startswith(REJECTED)}
        assert not [own for own in rejected if own[1] not in (404, 422)]  # 404 before it is found
        assert (name in ("patterns", "sparse_adapter", "links", "fifos")) == (422 in found)
        time.sleep(SETTLE_SECONDS)
        assert program.resident - memory <= MOST_GROWTH // (2 if name == "sparse_adapter" else 1)
        if FULL or name == list(ATTACKS)[-1]:
            with contextlib.ExitStack() as stack:
                for own in (name,) if FULL else ("idle_sockets", "slow_headers", name):
                    stack.enter_context(attacking(program, own))
                assert program.terminate() <= 10
    assert len(program.log) < 100_000
    assert "\nfastlora: key accepted" not in program.log
