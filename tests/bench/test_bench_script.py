"""The script of a GPU run, `bench/gpu.sh`, with a stub in place of Python: its rules one by one."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"

# What stands in for Python in the tests of the script: it notes its arguments and plays its part.
STUB = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps([arguments, os.environ.get("PYTHONPATH", "")]) + "\\n")
plan = json.loads({plan!r})
text, code = "", 0
if arguments[0] == "-":
    text = plan.get("probe", "16 1 some-card")
elif arguments[:2] == ["-m", "pytest"]:
    text, code = plan.get("pytest", ["3 passed in 0.1s", 0])
    if any(a.startswith("--max-warps") for a in arguments):
        text, code = plan["alone"]["--max-warps=8" in arguments]
elif arguments[:2] == ["-m", "pip"]:
    code = plan.get("pip", 0)
elif arguments[0].endswith("linear.py"):
    codes = plan.get("linear", [0])
    code = codes[min(open({log!r}).read().count("linear.py"), len(codes)) - 1]
print(text)
sys.exit(code)
"""


def _stubbed(
    tmp_path: Path, plan: dict[str, Any], *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    stub, log = tmp_path / "python-stub", tmp_path / "calls"
    stub.write_text(STUB.format(python=sys.executable, log=str(log), plan=json.dumps(plan)))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    result = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return result, calls


def _measurements(calls: list[Any]) -> list[list[str]]:
    return [arguments[1:] for arguments, _ in calls if arguments[0].endswith("linear.py")]


def _steps(output: str) -> dict[str, int]:
    """The steps of the plan, in order, with their limits in seconds."""
    found = re.findall(r"^--- \[\d+ s\] (.*) \(at most (\d+) s\)$", output, re.MULTILINE)
    return {name: int(limit) for name, limit in found}


PLAN = {
    "install": 20,
    "tests of cached launches": 25,
    "rules: reads of the L2 cache, tiles, partial sums": 50,
    "the other tests that are likely to be red": 60,
    "the host's cost of a linear": 20,
    "cuBLAS with beta 1, layers without PDL": 30,
    "sweep of tiles and plans": 200,
    "whole layers": 70,
    "profiles of three kernels": 30,
    "races": 20,
}


def test_green_on_a_gpu(tmp_path: Path) -> None:
    result, calls = _stubbed(tmp_path, {})
    assert result.returncode == 0, result.stdout + result.stderr
    (arguments,) = _measurements(calls)
    assert arguments[arguments.index("--tests") + 1] == "pass"
    assert arguments[arguments.index("--device") + 1] == "cuda"
    (host,) = [call for call, _ in calls if call[0].endswith("host.py")]
    assert host[host.index("--tests") + 1] == "pass"
    assert host[host.index("--device") + 1] == "cuda"
    assert Path(host[host.index("--out") + 1]).name == "host.csv"
    (mixed,) = [call for call, _ in calls if call[0].endswith("mixed_kernels.py")]
    assert mixed[mixed.index("--tests") + 1] == "pass"
    assert Path(mixed[mixed.index("--out") + 1]).name == "mixed.csv"
    (tune,) = [call for call, _ in calls if call[0].endswith("tune.py")]
    assert tune[tune.index("--tests") + 1] == "pass"
    assert 180 <= float(tune[tune.index("--seconds") + 1]) <= 200
    layers = [call for call, _ in calls if call[0].endswith("layer.py")]
    assert [call[call.index("--rank") + 1] for call in layers] == ["16", "64"]
    assert {call[call.index("--tests") + 1] for call in layers} == {"pass"}
    # Cached launches go first, then the tests that are the likeliest to be red, then the rest.
    cached, likeliest, rest = (call for call, _ in calls if call[:2] == ["-m", "pytest"])
    files = [argument for argument in cached + likeliest if argument.endswith(".py")]
    assert files[0] == "tests/kernels/test_cached_gpu_launches.py"
    assert len(files) > 4 and all((ROOT / file).is_file() for file in files)
    assert rest[-1] == "tests/kernels"
    assert [a for a in rest if a.startswith("--ignore")] == [f"--ignore={file}" for file in files]
    assert all({"--maxfail=30", "-n", "8"} <= set(call) for call in (cached, likeliest, rest))
    names = [Path(call[0]).stem for call, _ in calls if call[0].endswith(".py")]
    steps = ["assumptions", "host", "assumptions", "tune", "layer", "layer"]
    steps += ["precompile", "linear", "mixed_kernels", "summary", "summary"]
    tools = [name for name in names if name not in ("profiled", "sanitize")]
    assert tools == steps


def test_cached_launches_go_first_then_the_two_rules(tmp_path: Path) -> None:
    """In this order and with these limits, which add up to the time of a run."""
    result, calls = _stubbed(tmp_path, {})
    steps = _steps(result.stdout)
    assert list(steps.items()) == list(PLAN.items())
    assert sum(steps.values()) <= 525
    measured = [c for c, _ in calls if c[:2] == ["-m", "pytest"] or c[0].endswith(".py")]
    first, second, *_ = measured
    assert "tests/kernels/test_cached_gpu_launches.py" in first
    assert Path(second[0]).name == "assumptions.py"
    assert second[second.index("--only") + 1] == "l2,tiles,planes"
    assert second[second.index("--seconds") + 1] == "50"


def test_a_red_test_is_rerun_alone_with_fewer_warps(tmp_path: Path) -> None:
    test = "tests/kernels/test_a.py::test_b[fp16-3]"
    red = [f"FAILED {test} - boom\n1 failed in 1s", 1]
    plan = {"pytest": red, "alone": [["1 passed in 1s", 0], red]}
    result, calls = _stubbed(tmp_path, plan)
    assert result.returncode == 1
    alone = [call for call, _ in calls if call[-1] == test]
    steps = 3  # of tests, each of which fails
    assert [call[-2] for call in alone] == steps * ["--max-warps=8", "--max-warps=4"]
    assert all("--tb=long" in call and "-n" not in call for call in alone)
    assert f"{test}: red alone with at most 8 warps" in result.stdout
    assert f"{test}: green alone with at most 4 warps" in result.stdout
    assert (tmp_path / "out" / "tests.txt").read_text().count("=== ") == 2 * steps


@pytest.mark.parametrize("outcome", [["1 failed, 9 passed in 1s", 1], ["7 skipped in 1s", 0]])
def test_red_or_empty_tests_mark_the_rows_and_the_exit_code(
    tmp_path: Path, outcome: list[Any]
) -> None:
    result, calls = _stubbed(tmp_path, {"pytest": outcome})
    assert result.returncode == 1
    assert "FAILED: tests" in result.stdout
    (arguments,) = _measurements(calls)
    assert arguments[arguments.index("--tests") + 1] == "fail"


def test_a_crash_is_resumed_and_wrong_numbers_are_not(tmp_path: Path) -> None:
    result, calls = _stubbed(tmp_path, {"linear": [139, 75, 3]})
    assert result.returncode == 1
    assert "FAILED: benchmark" in result.stdout
    assert ["--resume" in arguments for arguments in _measurements(calls)] == [False, True, True]


def test_without_pip_the_checkout_is_imported(tmp_path: Path) -> None:
    result, calls = _stubbed(tmp_path, {"pip": 1})
    assert result.returncode == 0, result.stdout
    last_path = calls[-1][1].split(os.pathsep)
    assert last_path[0] == str(ROOT)


def test_no_gpu_and_bad_arguments_are_rejected(tmp_path: Path) -> None:
    result, calls = _stubbed(tmp_path, {"probe": "2 0 none"})
    assert (result.returncode, len(calls)) == (2, 1)
    assert "torch sees no GPU" in result.stderr
    for arguments in (("--fast",), ("--seconds", "0"), ("--seconds",), ("--tests", "nowhere")):
        result, _ = _stubbed(tmp_path, {}, *arguments)
        assert result.returncode == 2
        assert arguments[0] in result.stderr
