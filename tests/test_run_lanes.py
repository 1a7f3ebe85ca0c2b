"""The lane driver: it must never call a run green that is not."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import drawn

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
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # some import for seconds
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


def test_a_total_and_the_slowest_tests_of_all_lanes(root: Path, capfdbinary: Any) -> None:
    """Failures, errors and skips count too; what a test prints is no duration."""
    for folder, slow in (("tests", [0.6, 0.2]), ("tests/commands", [0.4])):
        seconds = [*slow, *[0.02] * 5]
        tests = [f"def test_{i}(): time.sleep({s})" for i, s in enumerate(seconds)]
        text = "\n".join(["import time", *tests])
        (root / folder / "test_s.py").write_text(text, encoding="utf-8")
    (root / "tests/aot/test_x.py").write_text(
        "import pytest, time\n"
        "@pytest.fixture\n"
        "def slow():\n    time.sleep(0.8)\n    raise ValueError\n"
        "def test_error(slow): ...\n"
        "def test_skip(): pytest.skip('why')\n"
        "def test_fail():\n    print('99.00s call     tests/fake.py::test')\n    assert False\n",
        encoding="utf-8",
    )
    assert run_lanes.main([]) == 1
    printed = capfdbinary.readouterr().out.decode()
    closing = printed[printed.index("===== all lanes") :]
    (total,) = (line for line in closing.splitlines() if line.startswith("total"))
    found = dict(part.split()[::-1] for part in total.split(" s ")[1].split(","))
    assert found == {"passed": "17", "failed": "1", "skipped": "1", "error": "1"}
    rows = [line.split() for line in closing.split("slowest 10 tests:\n")[1].splitlines()]
    assert len(rows) == 10
    assert [row[2:] for row in rows[:4]] == [
        ["aot", "tests/aot/test_x.py::test_error", "(setup)"],
        ["main", "tests/test_s.py::test_0"],
        ["commands", "tests/commands/test_s.py::test_0"],
        ["main", "tests/test_s.py::test_1"],
    ]
    assert not any("fake" in word for row in rows for word in row)


def test_an_unknown_lane_is_rejected(root: Path, capfdbinary: Any) -> None:
    with pytest.raises(SystemExit) as error:
        run_lanes.main(["--lane", "nope"])
    assert error.value.code == 2


def test_emulated_lanes_run_when_they_are_named(root: Path, capfdbinary: Any) -> None:
    (root / "tests/emulated").mkdir()
    asks = "import os\ndef test_it():\n    assert os.environ['EMULATE'] == 'sm_90'\n"
    (root / "tests/emulated/test_e.py").write_text(asks, encoding="utf-8")
    assert run_lanes.main([]) == 0
    assert b"emulated" not in capfdbinary.readouterr().out
    assert run_lanes.main(["--lane", "emulated-sm_90"]) == 0
    assert run_lanes.main(["--lane", "emulated-sm_80"]) == 1


def test_a_run_draws_cases_unless_all_are_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = "import os\ndef test_it():\n    assert os.environ['FASTLORA_CASES'] == 'drawn'\n"
    (root / "tests" / "test_cases.py").write_text(asks, encoding="utf-8")
    assert run_lanes.main(["--lane", "main"]) == 0
    monkeypatch.setenv("FASTLORA_CASES", "all")
    assert run_lanes.main(["--lane", "main"]) == 1
    assert run_lanes.NATIVE.env == {"FASTLORA_CASES": "all"}


def test_a_commit_draws_a_share_of_a_table(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cases each time for one commit, others for another, and every case for some."""
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parent / "conftest.py"))
    table = [Item(f"test_table.py::test_case[{i}]", pytest.mark.drawn(0.4)) for i in range(500)]
    always = Item("test_table.py::test_always", None)

    def chosen(commit: str) -> set[str]:
        left_out: list[Item] = []
        hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
        monkeypatch.setattr(drawn, "commit", lambda: commit)
        items = [*table, always]
        conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        assert always in items
        assert len(items) + len(left_out) == len(table) + 1
        return {item.nodeid for item in items}

    monkeypatch.setenv("FASTLORA_CASES", "all")
    assert len(chosen("a")) == 501
    monkeypatch.setenv("FASTLORA_CASES", "drawn")
    commits = {commit: chosen(commit) for commit in "abcdefgh"}
    assert commits["a"] == chosen("a") != commits["b"]
    assert all(len(cases) == 201 for cases in commits.values())
    assert len(set.union(*commits.values())) >= 480
    table = table[:1]  # which is drawn always
    assert len(chosen("a")) == 2


@dataclass(frozen=True)
class Item:
    """A test as pytest collects it."""

    nodeid: str
    mark: Any

    def get_closest_marker(self, name: str) -> Any:
        return self.mark.mark if self.mark is not None and name == "drawn" else None
