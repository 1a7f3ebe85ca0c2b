"""Runs the test suite as four lanes, each in a process of its own.

``main`` is what runs as it is; ``interpreter`` is ``tests/kernels`` under ``TRITON_INTERPRET=1``
(Triton reads it once per process); ``commands`` are tests that start programs of ours, apart so
that the lanes take about as long on two cores; ``aot`` compiles the kernels ahead of time for every
supported GPU. A fifth lane, ``native``, runs ``tests/kernels`` on the GPU where
there is one. Three more run only when they are named: ``emulated-sm_80`` and ``emulated-sm_90``
are ``tests/emulated``, kernels as compiled for each chip and executed on the CPU, and ``emulator``
has the tests of what executes them. Lanes run beside each other as far as the cores allow. The
first one's output is shown while it comes, that of each other one whole when its turn comes, then
pytest's closing lines, their total and the slowest tests. Of tests that are marked ``drawn`` a part
runs, which the hash of the commit draws; all of them run on a GPU, and with ``FASTLORA_CASES=all``.

    python tests/run_lanes.py [--jobs N] [--lane NAME]... [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code for an empty run
SLOWEST = 10


@dataclass(frozen=True)
class Lane:
    """One pytest process: its paths, and the environment it needs."""

    name: str
    paths: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a lane ended."""

    lane: Lane
    code: int
    seconds: float
    output: str

    @property
    def closing(self) -> str:
        """Pytest's last line, or the last line of whatever came out instead."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "(no output)"

    def counts(self) -> Counter[str]:
        """Tests by outcome, from pytest's last line: ``{"passed": 3, "skipped": 1}``."""
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)", self.closing)
        return Counter({word.replace("errors", "error"): int(number) for number, word in found})

    def durations(self) -> list[tuple[float, str]]:
        """Seconds and names of the slowest tests or fixtures, from the table that pytest prints."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.output)
        table = re.split(r"^=+ slowest \d+ durations =+$", plain, flags=re.M)[1:]
        rows = re.findall(r"^ *([\d.]+)s (call|setup|teardown) +(.+)$", "".join(table[-1:]), re.M)
        return [
            (float(seconds), name if phase == "call" else f"{name} ({phase})")
            for seconds, phase, name in rows
        ]


PROGRAMS = ("tests/commands", "tests/crash", "tests/distributed")
LANES = (
    Lane(
        "main",
        ("tests",),
        ignore=(
            *("tests/kernels", "tests/aot", "tests/emulated", "tests/emulator", "tests/engine"),
            *PROGRAMS,
        ),
    ),
    Lane("interpreter", ("tests/kernels",), env={"TRITON_INTERPRET": "1"}),
    Lane("commands", PROGRAMS),
    Lane("aot", ("tests/aot",)),
)
EMULATED = (
    Lane("emulated-sm_80", ("tests/emulated",), env={"EMULATE": "sm_80"}),
    Lane("emulated-sm_90", ("tests/emulated",), env={"EMULATE": "sm_90"}),
    Lane("emulator", ("tests/emulator",)),
)
NATIVE = Lane("native", ("tests/kernels",), env={"FASTLORA_CASES": "all"})


def lanes_here() -> tuple[Lane, ...]:
    """Returns the lanes of this machine: the GPU one only where torch sees a GPU."""
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    has_gpu = subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
    return (*LANES, NATIVE) if has_gpu else LANES


def run_lane(lane: Lane, pytest_args: Sequence[str], live: bool) -> Outcome:
    """Runs one lane to its end; ``live`` shows its output while it comes."""
    paths = [path for path in lane.paths if (ROOT / path).exists()]
    if not paths:
        return Outcome(lane, 1, 0.0, f"none of {', '.join(lane.paths)} exists")
    command = [sys.executable, "-m", "pytest", "-q", f"--durations={SLOWEST}", *paths]
    command += [f"--ignore={path}" for path in lane.ignore]
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    # One thread a lane: lanes share the cores, and threads that wait for each other stall both.
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("FASTLORA_CASES", "drawn")
    environment.update(lane.env)
    start = time.monotonic()
    output = b""
    with subprocess.Popen(
        [*command, *pytest_args],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            output += chunk
            if live:
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
    seconds = time.monotonic() - start
    return Outcome(lane, process.returncode, seconds, output.decode("utf-8", "replace"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the lanes and returns 0 when every one of them passed."""
    parser = argparse.ArgumentParser(description="run the test suite, each lane in its own process")
    parser.add_argument("--jobs", type=int, default=_cores(), help="lanes at a time")
    parser.add_argument("--lane", action="append", help="only this lane; repeatable")
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest, after --")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    lanes = (*lanes_here(), *EMULATED)
    names = [lane.name for lane in lanes]
    unknown = [name for name in args.lane or [] if name not in names]
    if unknown:
        parser.error(f"no lane {unknown[0]!r} here, expected one of {', '.join(names)}")
    asked = args.lane or [lane.name for lane in lanes if lane not in EMULATED]
    chosen = [lane for lane in lanes if lane.name in asked]

    outcomes = []
    start = time.monotonic()
    _say(f"lanes: {', '.join(lane.name for lane in chosen)}; {min(args.jobs, len(chosen))} at once")
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        running = [
            pool.submit(run_lane, lane, args.pytest_args, live=lane is chosen[0]) for lane in chosen
        ]
        _say(f"\n===== {chosen[0].name} =====")
        for lane, future in zip(chosen, running, strict=True):
            outcome = future.result()
            outcomes.append(outcome)
            if lane is not chosen[0]:
                _say(f"\n===== {lane.name} =====\n{outcome.output.rstrip()}")

    _say("\n===== all lanes =====")
    for outcome in outcomes:
        verdict = "passed" if passed(outcome, args.pytest_args) else f"FAILED ({outcome.code})"
        _say(f"{outcome.lane.name:<12}{outcome.seconds:6.0f} s  {verdict:<12} {outcome.closing}")
    total = sum((outcome.counts() for outcome in outcomes), Counter())
    counts = ", ".join(f"{number} {word}" for word, number in total.items()) or "no tests"
    _say(f"{'total':<12}{time.monotonic() - start:6.0f} s  {'':<12} {counts}")
    rows = [(*row, outcome.lane.name) for outcome in outcomes for row in outcome.durations()]
    _say(f"\nslowest {SLOWEST} tests:")
    for seconds, name, lane in sorted(rows, reverse=True)[:SLOWEST]:
        _say(f"{seconds:8.1f} s  {lane:<12} {name}")
    return 0 if all(passed(outcome, args.pytest_args) for outcome in outcomes) else 1


def passed(outcome: Outcome, pytest_args: Sequence[str]) -> bool:
    """Whether a lane is green. A lane without a test is not, unless a filter was passed on."""
    return outcome.code == 0 or (outcome.code == NO_TESTS and bool(pytest_args))


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
