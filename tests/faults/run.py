"""`make faults`: puts each fault into a copy of the project, where its tests then have to fail.

    python -m tests.faults.run [--share SHARE] [--only WORD] [--jobs N]

With ``--share 0.1`` the hash of the commit draws a tenth of the faults.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.fault import ROOT, Fault, all_faults
from tests.run_lanes import LANES
from tests.support.drawn import commit, draw

COPIED = ("fastlora", "kernels", "tests", "bench", "docs", "examples")
FILES = ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml")
# Seconds for the tests of one fault.
LIMIT = 180


def copy_to(folder: Path) -> Path:
    """Copies what tests need, with its bytecode, which stays valid for files with equal times."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    for name in ("kernels", "bench"):  # else the installed package's are imported
        (folder / "fastlora" / name).symlink_to(folder / name)
    return folder


def failures(folder: Path, tests: Sequence[str], limit: float) -> tuple[list[str], str]:
    """Runs tests in a copy of the project; returns the names of failed ones, and the output."""
    failed: list[str] = []
    output = ""
    for interpreted in (False, True):
        chosen = [name for name in tests if _is_interpreted(name) == interpreted]
        if not chosen:
            continue
        environment = {name: own for name, own in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "FASTLORA_CASES": "all"}
        environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # which takes a second to import
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rf",
            "--tb=line",
            "-p",
            "no:cacheprovider",
        ]
        try:
            ended = subprocess.run(
                [*command, *chosen],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return failed, f"took more than {limit} s"
        output += ended.stdout + ended.stderr
        lines = [line for line in ended.stdout.splitlines() if line.startswith("FAILED ")]
        failed += [line.removeprefix("FAILED ").partition(" - ")[0] for line in lines]
        if ended.returncode < 0:  # a signal: a test read or wrote memory that is not its own
            failed += chosen
        elif ended.returncode not in (0, 1):
            return [], output
    return failed, output


def attempt(fault: Fault) -> str:
    """Plants a fault and runs its tests; returns what is wrong, and nothing if all of them fail."""
    with tempfile.TemporaryDirectory(prefix="fastlora-fault-") as scratch:
        folder = copy_to(Path(scratch))
        try:
            text = fault.planted(folder)
        except (OSError, ValueError) as error:
            return f"does not apply: {error}"
        (folder / fault.path).write_text(text, encoding="utf-8")
        failed, output = failures(folder, fault.tests, LIMIT)
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
    with tempfile.TemporaryDirectory(prefix="fastlora-faults-") as scratch:
        failed, output = failures(copy_to(Path(scratch)), tests, LIMIT + 30 * len(chosen))
    passed = " passed" in output and not failed
    _say("without a fault: all tests pass" if passed else f"WITHOUT A FAULT: {output[-3000:]}")
    bad = 0
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        for fault, wrong in zip(chosen, pool.map(attempt, chosen), strict=True):
            bad += bool(wrong)
            _say(f"{'FAILED' if wrong else 'noticed':<8} {fault.path}: {fault.sentence} {wrong}")
    _say(f"{len(chosen) - bad} of {len(chosen)} faults noticed")
    return 1 if bad or not passed else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
