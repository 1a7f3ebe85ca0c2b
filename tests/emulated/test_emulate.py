"""`make emulate`: a second run leaves out what passed, and sm_100 is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.emulated import emulate

pytestmark = pytest.mark.skipif(os.environ.get("EMULATE") != "sm_80", reason="once is enough")
TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert not {fails}
def test_skips(): pytest.skip("it says why")
"""


def run(folder: Path, fails: bool) -> list[dict[str, Any]]:
    """Runs the tests on sm_80 in a process of their own, and returns the new lines of the log."""
    path, log = folder / "test_some.py", folder / "log.jsonl"
    path.write_text(TESTS.format(fails=fails), encoding="utf-8")
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    code = f"from tests.emulated.emulate import *; execute(Run('cases', 'sm_80', {path!r}), '')"
    code = f"from pathlib import PosixPath; {code}"
    environment = {**os.environ, "EMULATE_FOLDER": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=emulate.ROOT, check=True)
    lines = log.read_text(encoding="utf-8").removeprefix(before).splitlines()
    return [json.loads(line) for line in lines]


def test_a_second_run_leaves_out_what_did_not_fail(tmp_path: Path) -> None:
    first = run(tmp_path, fails=True)
    assert [line["outcome"] for line in first] == ["passed", "failed", "skipped"]
    assert "it says why" in first[2]["reason"] and first[0]["reason"] == "launches no kernel"
    second = run(tmp_path, fails=False)
    assert [line["test"].partition("::")[2] for line in second] == ["test_fails"]
    assert second[0]["outcome"] == "passed"


def test_sm_100_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        emulate.main(["--chip", "sm_100"])
    assert "does not execute sm_100" in capsys.readouterr().err
