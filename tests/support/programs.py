"""Programs that tests start, and the one line that a failing command prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.commands import cli

ROOT = Path(__file__).resolve().parents[2]


def run(
    *arguments: object, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python over this checkout in a process of its own, which may keep bytecode."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def python(code: str, cwd: Path, *flags: str, **env: str) -> str:
    """Runs code that must not fail, and returns what it prints; without a path of ours."""
    done = run(*flags, "-c", code, cwd=cwd, **{"PYTHONPATH": "", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command, which must fail in one line, and returns that."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("fastlora: error: ")]
    assert errors == lines[-1:] and "Traceback" not in "".join(lines)
    return errors[0]
