"""Kernel tests start Triton's interpreter by themselves, or say that they did not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
KERNELS = "tests/kernels/test_mixed_dora_scale.py"


def run(*paths: str, code: int = 0, interpret: str | None = None) -> str:
    """Runs test files without a GPU; returns what pytest prints.

    TRITON_INTERPRET has the value ``interpret``, or is not set.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_one_file_runs() -> None:
    out = run(KERNELS)
    assert " passed" in out and "skipped" not in out


def test_beside_other_tests_they_skip_with_the_command_that_runs_them() -> None:
    out = run("tests/testing/test_tolerances.py", KERNELS)
    assert " passed" in out and " skipped" in out
    assert "kernel tests did not run" in out
    assert "Run them alone: python -m pytest tests/kernels." in out


def test_a_run_in_which_all_were_skipped_is_not_green() -> None:
    out = run(KERNELS, interpret="0", code=pytest.ExitCode.NO_TESTS_COLLECTED)
    assert " passed" not in out and " skipped" in out
    assert "kernel tests did not run" in out
