"""`make faults`: puts each fault into a copy of the project, where its tests then have to fail.

    python -m tests.faults.run [--share SHARE] [--only WORD] [--jobs N]

With ``--share 0.1`` the hash of the commit draws a tenth of the faults.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.faults.fault import ROOT, Fault, all_faults
from tests.faults.forks import Forks, forks
from tests.run_lanes import LANES
from tests.support.drawn import commit, draw

COPIED = ("fastlora", "kernels", "tests", "bench", "docs", "examples")
FILES = ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml")
# Seconds for the tests of one fault.
LIMIT = 180
# The second plugin collects all garbage at the end of a run, which takes longer than most tests.
OPTIONS = ("-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "-p", "no:unraisableexception")


def copy_to(folder: Path, source: Path = ROOT) -> Path:
    """Copies what tests need, with its bytecode, which stays valid for files with equal times."""
    for name in COPIED:
        shutil.copytree(source / name, folder / name, symlinks=True)
    for name in FILES:
        shutil.copy2(source / name, folder / name)
    for name in ("kernels", "bench"):  # else the installed package's are imported
        link = folder / "fastlora" / name
        if not link.is_symlink():
            link.symlink_to(Path("..", name))
    return folder


@contextmanager
def lanes_of(tests: Sequence[str]) -> Iterator[dict[bool, Forks]]:
    """Starts what runs the tests, by whether Triton interprets kernels there."""
    with ExitStack() as stack:
        lanes = {}
        for interpreted in sorted({_is_interpreted(name) for name in tests}):
            environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
            lanes[interpreted] = stack.enter_context(forks(environment))
        yield lanes


def failures(
    lanes: Mapping[bool, Forks], folder: Path, tests: Sequence[str], limit: float
) -> tuple[list[str], str]:
    """Runs tests in a copy of the project; returns the names of failed ones, and the output."""
    failed: list[str] = []
    output = ""
    for interpreted, lane in lanes.items():
        chosen = [name for name in tests if _is_interpreted(name) == interpreted]
        if not chosen:
            continue
        code, printed = lane.pytest(folder, (*OPTIONS, *chosen), limit)
        if code is None:
            return failed, f"took more than {limit} s"
        output += printed
        lines = [line for line in printed.splitlines() if line.startswith("FAILED ")]
        failed += [line.removeprefix("FAILED ").partition(" - ")[0] for line in lines]
        if code < 0:  # a signal: a test read or wrote memory that is not its own
            failed += chosen
        elif code not in (0, 1):
            return [], output
    return failed, output


def attempt(fault: Fault, lanes: Mapping[bool, Forks], source: Path) -> str:
    """Plants a fault into a copy, and runs its tests there.

    Returns:
        What is wrong, and nothing if all of its tests fail.
    """
    with tempfile.TemporaryDirectory(prefix="fastlora-fault-") as scratch:
        folder = copy_to(Path(scratch), source)
        try:
            text = fault.planted(folder)
        except (OSError, ValueError) as error:
            return f"does not apply: {error}"
        (folder / fault.path).write_text(text, encoding="utf-8")
        failed, output = failures(lanes, folder, fault.tests, LIMIT)
    unnoticed = [name for name in fault.tests if not any(_is_case(own, name) for own in failed)]
    if not unnoticed:
        return ""
    return f"not noticed by {', '.join(unnoticed)}\n{output[-1500:]}"


def _is_case(test: str, name: str) -> bool:
    """Whether a test is the named one, or one of its cases."""
    return test == name or test.startswith((f"{name}[", f"{name}::"))


def _is_interpreted(test: str) -> bool:
    """Whether the suite runs a test under Triton's interpreter."""
    lane = next(lane for lane in LANES if lane.name == "interpreter")
    return test.startswith(lane.paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Tries the faults, and returns 0 when the tests of each one fail with it, and pass without."""
    parser = argparse.ArgumentParser(description="plant faults, and see that the tests notice")
    parser.add_argument("--share", type=float, default=1.0, help="part of the faults, drawn")
    parser.add_argument("--only", default="", help="faults with this in their file or sentence")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time")
    args = parser.parse_args(argv)
    faults = {fault.sentence: fault for fault in all_faults()}
    chosen = [faults[name] for name in sorted(draw(tuple(faults), args.share, "faults"))]
    chosen = [fault for fault in chosen if args.only in f"{fault.path} {fault.sentence}"]
    _say(f"{len(chosen)} of {len(faults)} faults, drawn by commit {commit()[:10]}")
    if not chosen:
        return 1

    tests = sorted({name for fault in chosen for name in fault.tests})
    bad = 0
    with (
        lanes_of(tests) as lanes,
        ThreadPoolExecutor(max_workers=args.jobs) as pool,
        tempfile.TemporaryDirectory(prefix="fastlora-faults-") as scratch,
    ):
        copy = copy_to(Path(scratch))  # with the bytecode that its tests write
        files = [
            [*names] for _, names in itertools.groupby(tests, lambda name: name.split("::")[0])
        ]
        ran = pool.map(lambda names: failures(lanes, copy, names, 10 * LIMIT), files)
        wrong = [output for failed, output in ran if failed or " passed" not in output]
        _say(f"WITHOUT A FAULT: {''.join(wrong)[-3000:]}" if wrong else "without a fault: all pass")
        found = pool.map(lambda fault: attempt(fault, lanes, copy), chosen)
        for fault, why in zip(chosen, found, strict=True):
            bad += bool(why)
            _say(f"{'FAILED' if why else 'noticed':<8} {fault.path}: {fault.sentence} {why}")
    _say(f"{len(chosen) - bad} of {len(chosen)} faults noticed")
    return 1 if bad or wrong else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
