"""The lane driver: it must never call a run green that is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "run_lanes", Path(__file__).with_name("run_lanes.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
run_lanes = importlib.util.module_from_spec(_SPEC)
sys.modules["run_lanes"] = run_lanes  # dataclasses look their module up
_SPEC.loader.exec_module(run_lanes)

MAIN = "def test_main():\n    import os\n    assert 'TRITON_INTERPRET' not in os.environ\n"
KERNELS = "def test_kernel():\n    import os\n    assert os.environ['TRITON_INTERPRET'] == '1'\n"
AOT = "def test_aot():\n    pass\n"
BROKEN = "def test_broken():\n    assert False, 'broken on purpose'\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_lanes, "ROOT", tmp_path)
    monkeypatch.setattr(run_lanes, "lanes_here", lambda: run_lanes.LANES)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the main lane
    for path, text in (
        ("tests/test_main.py", MAIN),
        ("tests/kernels/test_k.py", KERNELS),
        ("tests/aot/test_a.py", AOT),
        ("tests/commands/test_c.py", MAIN),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


def test_green_lanes(root: Path, capfdbinary: Any) -> None:
    assert run_lanes.main(["--jobs", "2"]) == 0
    printed = capfdbinary.readouterr().out.decode()
    closing = printed[printed.index("===== all lanes") :]
    assert closing.count("1 passed") == 4
    assert "FAILED" not in closing


@pytest.mark.parametrize("folder", ["tests", "tests/kernels", "tests/aot", "tests/commands"])
def test_a_failure_in_any_lane_fails_the_run(root: Path, folder: str, capfdbinary: Any) -> None:
    (root / folder / "test_x.py").write_text(BROKEN, encoding="utf-8")
    assert run_lanes.main([]) == 1
    printed = capfdbinary.readouterr().out.decode()
    assert "broken on purpose" in printed
    assert printed[printed.index("===== all lanes") :].count("FAILED") == 1


def test_a_lane_without_tests_is_not_green(root: Path, capfdbinary: Any) -> None:
    (root / "tests/aot/test_a.py").unlink()
    assert run_lanes.main(["--lane", "aot"]) == 1
    (root / "tests/aot").rmdir()
    assert run_lanes.main(["--lane", "aot"]) == 1


def test_a_filter_may_leave_a_lane_empty(root: Path, capfdbinary: Any) -> None:
    assert run_lanes.main(["--", "-k", "test_main"]) == 0


def test_an_unknown_lane_is_refused(root: Path, capfdbinary: Any) -> None:
    with pytest.raises(SystemExit) as error:
        run_lanes.main(["--lane", "nope"])
    assert error.value.code == 2
