"""A pytest plugin: tests of kernels run on a CPU, as compiled for an NVIDIA GPU.

    EMULATE=sm_90 EMULATE_SMS=132 python -m pytest -p tests.emulator.plugin tests/kernels

A test in which a check reports something fails. Environment variables:

* ``EMULATE``: the chip, ``sm_80`` by default;
* ``EMULATE_SMS``: its multiprocessors, 4 by default, which choose tiles and numbers of programs;
* ``EMULATE_ORDER``: of warps and programs: 0 forward, 1 shuffled, 2 backward;
* ``EMULATE_SEED``: of the shuffled order;
* ``EMULATE_LIMIT``: instructions after which a launch is given up;
* ``EMULATE_LOG``: a file that gets a line of JSON for each launch.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.emulator.driver import Emulation, emulate


def _start() -> Emulation:
    """Starts before the tests' modules are imported, which take some of what is replaced."""
    block = emulate(
        os.environ.get("EMULATE", "sm_80"),
        int(os.environ.get("EMULATE_SMS", "4")),
        order=int(os.environ.get("EMULATE_ORDER", "0")),
        seed=int(os.environ.get("EMULATE_SEED", "1")),
        limit=int(os.environ.get("EMULATE_LIMIT", "0")),
        log=os.environ.get("EMULATE_LOG", ""),
    )
    pytest.register_assert_rewrite("tests.support")
    from tests.support.kernels import lab

    lab.native, lab.interpreted = (lambda: True), (lambda: False)
    lab.Lab.device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]
    atexit.register(block.__exit__, None, None, None)
    return block.__enter__()


emulation = _start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test in which a check reported something."""
    earlier = len(emulation.launches)
    yield
    found = [report for launch in emulation.launches[earlier:] for report in launch.reports]
    if found:
        pytest.fail("the emulator reports:\n" + "\n".join(found[:20]), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many launches ran, and what was reported."""
    kernels = Counter(launch.kernel for launch in emulation.launches)
    terminalreporter.section(f"emulated as {emulation.chip}")
    terminalreporter.line(f"{kernels.total()} launches: {dict(kernels)}")
    reports = Counter(report.split(", PTX line")[0] for report in emulation.reports)
    for report, instructions in reports.most_common():
        terminalreporter.line(f"{instructions} instructions: {report}")
