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


def run(*paths: str) -> str:
    """Runs test files without a GPU and without TRITON_INTERPRET; returns what pytest prints."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_one_file_runs() -> None:
    out = run(KERNELS)
    assert " passed" in out and "skipped" not in out


def test_beside_other_tests_they_skip_with_the_command_that_runs_them() -> None:
    out = run("tests/testing/test_tolerances.py", KERNELS)
    assert " passed" in out and " skipped" in out
    assert "kernel tests did not run" in out
    assert "Run them alone: python -m pytest tests/kernels." in out
