"""Programs that tests start, and the one line that a failing command prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.commands import cli


def python(code: str, cwd: Path, *flags: str, **env: str) -> str:
    """Runs code in a new interpreter, which may keep bytecode, and returns what it prints."""
    environment = {**os.environ, **env}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
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
