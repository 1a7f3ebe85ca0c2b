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


def run(folder: Path, part: str, fails: bool, tests: str = TESTS) -> list[dict[str, Any]]:
    """Runs the tests on sm_80 in a process of their own, and returns the new lines of the log."""
    path, log = folder / "test_some.py", folder / "log.jsonl"
    path.write_text(tests.format(fails=fails), encoding="utf-8")
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    code = f"from tests.emulated.emulate import *; execute(Run({part!r}, 'sm_80', {path!r}), '')"
    code = f"from pathlib import PosixPath; {code}"
    environment = {**os.environ, "EMULATE_FOLDER": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=emulate.ROOT, check=True)
    lines = log.read_text(encoding="utf-8").removeprefix(before).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("part", ["kernels", "cases"])
def test_a_second_run_leaves_out_what_did_not_fail(tmp_path: Path, part: str) -> None:
    """Cases start over, because coverage is known where one process ran all of them."""
    first = run(tmp_path, part, fails=True)
    assert [line["outcome"] for line in first] == ["passed", "failed", "skipped"]
    assert "it says why" in first[2]["reason"] and first[0]["reason"] == "launches no kernel"
    second = run(tmp_path, part, fails=False)
    names = [line["test"].partition("::")[2] for line in second]
    every = ["test_passes", "test_fails", "test_skips"]
    assert names == (every if part == "cases" else ["test_fails"])
    assert all(line["outcome"] != "failed" for line in second)
    assert run(tmp_path, part, fails=False) == []


def test_a_file_that_is_skipped_whole_is_written_down_once(tmp_path: Path) -> None:
    path, log = tmp_path / "test_some.py", tmp_path / "log.jsonl"
    skips = "import pytest\npytest.skip('it says why', allow_module_level=True)\n"
    for _ in range(2):
        run(tmp_path, "kernels", fails=False, tests=skips)
    (line,) = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert line["test"].endswith(path.name)
    assert line["outcome"] == "skipped" and "it says why" in line["reason"]


def test_sm_100_is_rejected_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        emulate.main(["--chip", "sm_100"])
    assert "does not execute sm_100" in capsys.readouterr().err


def test_only_code_starts_the_runs_over() -> None:
    source = b'"""A module."""\n\ndef f(x):\n    """Doubles."""\n    return 2 * x\n'
    same = b"def f(x):\n    # What f does.\n    return 2 * x\n"
    other = source.replace(b"2 * x", b"3 * x")
    found = [emulate.without_comments(each) for each in (source, same, other)]
    assert found[0] == found[1] != found[2]
