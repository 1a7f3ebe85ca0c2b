"""A pytest plugin for `make emulate`: writes down what each test did, and leaves out what passed.

``$EMULATE_RECORD`` is JSON with a hash of the code, the part, the chip and the version of Triton.
A test that the log has with these runs again only if it failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import triton

from tests.emulated.emulate import LOG, outcomes

KEY = json.loads(os.environ["EMULATE_RECORD"])
assert KEY["triton"] == triton.__version__
# Tests of tests/kernels that the emulator cannot run, by a part of their name.
LEFT_OUT = {
    "test_cached_gpu_launches.py": "needs streams and graphs of CUDA",
    "test_mixed_ops.py::test_cuda_graph": "needs graphs of CUDA",
    "test_a_deleted_adapter_leaves_no_memory_behind": "the emulator keeps the last launch's memory",
}
# Launches of earlier tests.
_COUNTED = pytest.StashKey[int]()


def write(test: str, outcome: str, **more: Any) -> None:
    """Appends a test's line."""
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**KEY, "test": test, "outcome": outcome, **more}) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that ran before, and those of `LEFT_OUT`."""
    known = outcomes(KEY)
    over = {test for test, line in known.items() if line["outcome"] != "failed"}
    done = [item for item in items if item.nodeid in over]
    if KEY["part"] == "cases" and len(done) < len(items):
        done = []  # how much of a kernel ran is known where one process ran all cases
    for item in items:
        reason = next((why for part, why in LEFT_OUT.items() if part in item.nodeid), "")
        if reason and item not in done:
            write(item.nodeid, "left out", reason=reason)
            done.append(item)
    items[:] = [item for item in items if item not in done]
    config.hook.pytest_deselected(items=done)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Writes down a file that is skipped whole."""
    if report.skipped and report.nodeid not in outcomes(KEY):
        write(report.nodeid, "skipped", reason=str(report.longrepr[2]))  # type: ignore[index]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Writes a test down when its call ends, or when it ends before its call."""
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        plugin: Any = item.config.pluginmanager.get_plugin("tests.emulator.plugin")
        launches = plugin.emulation.launches[item.config.stash.get(_COUNTED, 0) :]
        item.config.stash[_COUNTED] = len(plugin.emulation.launches)
        more: dict[str, Any] = {"seconds": round(report.duration, 1), "launches": len(launches)}
        more["kernels"] = sorted({launch.kernel for launch in launches})
        more["reports"] = [text for launch in launches for text in launch.reports][:5]
        if report.skipped:
            more["reason"] = report.longrepr[2]
        elif report.failed:
            more["reason"] = str(report.longrepr)[-2000:]
        elif not launches:
            more["reason"] = "launches no kernel"
        write(item.nodeid, report.outcome, **more)
    return report
