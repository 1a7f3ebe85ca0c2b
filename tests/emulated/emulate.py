"""`make emulate`: what takes longer than CI has, on compiled kernels that are executed on the CPU.

    python -m tests.emulated.emulate [--part PART]... [--chip CHIP]... [--triton FOLDER]

Parts:

* ``kernels``: the tests of ``tests/kernels``, on sm_80 and sm_90;
* ``cases``: every case of the lane, and how much of each kernel ran, on those, sm_86, sm_89 and
  sm_120;
* ``configurations``: every config that `choose` returns for the layers of Llama 3.1 8B on an A100
  and an H100.

``--triton`` takes another version of Triton, by default for ``cases`` alone:

    pip install --no-deps --target ../triton36 triton==3.6.0
    make emulate ARGS="--triton ../triton36"

``log.jsonl`` in ``.emulate``, or in the folder ``$EMULATE_FOLDER``, keeps a line for each test. A
second run of the same code leaves out what did not fail.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from tests.emulator.build import library, unavailable_reason
from tests.emulator.driver import CHIPS

ROOT = Path(__file__).resolve().parents[2]
LOG = Path(os.environ.get("EMULATE_FOLDER") or ROOT / ".emulate") / "log.jsonl"
# What a run's results depend on.
FOLDERS = (
    *("fastlora", "kernels", "tests/conftest.py"),
    *("tests/emulated", "tests/emulator", "tests/kernels", "tests/support"),
)
NO_TESTS = 5  # pytest's exit code for an empty run
LANE = ("sm_80", "sm_90")
CHIPS_OF = {
    "kernels": LANE,
    "cases": (*LANE, "sm_86", "sm_89", "sm_120"),
    "configurations": LANE,
}


class Run(NamedTuple):
    """One pytest process: the tests of a file on a chip."""

    part: str
    chip: str
    path: Path


@functools.cache
def code() -> str:
    """Returns a hash of the files that the runs depend on, Python's without comments."""
    asked = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--", *FOLDERS]
    files = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    found = hashlib.sha256()
    for name in sorted(files):
        # A file may be deleted and not committed yet.
        content = (ROOT / name).read_bytes() if (ROOT / name).exists() else b""
        if name.endswith(".py"):
            content = without_comments(content)
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


def without_comments(source: bytes) -> bytes:
    """Returns a Python file's syntax tree as text, without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree).encode()


def runs(parts: Sequence[str], chips: Sequence[str]) -> list[Run]:
    """Returns the processes of some parts; without chips on all of a part's chips."""
    found = []
    for part in parts:
        files = [ROOT / "tests" / "emulated" / f"test_{part}.py"]
        if part == "kernels":
            files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        found += [Run(part, chip, path) for chip in chips or CHIPS_OF[part] for path in files]
    return found


def version_of(folder: str) -> str:
    """Returns the version of Triton in a folder, or of the installed one."""
    found = distributions(name="triton", path=[folder] if folder else sys.path)
    return next(iter(found)).version


def execute(run: Run, folder: str) -> int:
    """Runs a process to its end, and returns its exit code."""
    environment = {name: own for name, own in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"EMULATE": run.chip, "FASTLORA_CASES": "all", "OMP_NUM_THREADS": "1"}
    environment["EMULATE_RECORD"] = json.dumps(key_of(run, folder))
    if folder:
        paths = (folder, os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin"]
    command += ["-p", "tests.emulated.record", str(run.path)]
    output = LOG.parent / f"{run.part}-{run.chip}-{run.path.stem}.txt"
    with output.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    verdict = {0: "passed", NO_TESTS: "nothing is left to run"}
    closing = verdict.get(code, f"FAILED ({code}), see {output}")
    _say(f"{run.part:<15} {run.chip:<7} {run.path.stem:<32} {closing}")
    return 0 if code == NO_TESTS else code


def key_of(run: Run, folder: str) -> dict[str, str]:
    """Returns what identifies a run in the log."""
    return {"code": code(), "part": run.part, "chip": run.chip, "triton": version_of(folder)}


def outcomes(key: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the last line of each test with a key."""
    if not LOG.exists():
        return {}
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: line for line in lines if key.items() <= line.items()}


def report(key: dict[str, str]) -> None:
    """Says how many tests of a part passed on a chip, and which launched nothing, and why."""
    lines = outcomes(key)
    reasons: dict[str, list[str]] = defaultdict(list)
    for test, line in lines.items():
        if "reason" in line:
            failed = line["outcome"] == "failed"
            reasons["failed" if failed else f"not emulated: {line['reason']}"].append(test)
    _say(f"\n===== {key['part']}, {key['chip']}, Triton {key['triton']} =====")
    for reason, tests in sorted(reasons.items()):
        _say("\n    ".join([f"{reason}:", *sorted(tests)]))
    counts = Counter(line["outcome"] for line in lines.values())
    _say(", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is left to run, and returns 0 when nothing failed."""
    parser = argparse.ArgumentParser(description="run compiled kernels on the CPU, at length")
    parser.add_argument("--part", action="append", choices=tuple(CHIPS_OF), help="repeatable")
    parser.add_argument("--chip", action="append", default=[], help="instead of the part's own")
    parser.add_argument("--triton", default="", help="a folder with another version of Triton")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    args = parser.parse_args(argv)
    for chip in args.chip:
        if chip not in CHIPS:
            parser.error(f"the emulator does not execute {chip}, expected one of {CHIPS}")
    if reason := unavailable_reason():
        parser.error(reason)
    library()  # once, before several processes want it
    LOG.parent.mkdir(exist_ok=True)
    parts = args.part or (["cases"] if args.triton else list(CHIPS_OF))
    todo = runs(parts, args.chip)
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        codes = list(pool.map(lambda run: execute(run, args.triton), todo))
    for run in {(run.part, run.chip): run for run in todo}.values():
        report(key_of(run, args.triton))
    return 1 if any(codes) else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
