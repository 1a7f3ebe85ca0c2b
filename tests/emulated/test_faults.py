"""The checks and the values tell of faults, some of which the commit draws.

`plant_faults.py` draws 300, and `planted_faults.csv` has what became of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.emulated.cases import CORE
from tests.emulated.plant_faults import Place, attempt, survey, table
from tests.emulator.driver import Emulation
from tests.emulator.faults import KINDS
from tests.support.drawn import commit

# A few faults have no effect, so one of several must be detected.
MOST = 6
Surveyed = tuple[list[Place], dict[str, int]]


@pytest.fixture(scope="module")
def surveyed(pytestconfig: pytest.Config) -> Surveyed:
    """The places of faults in the cases that run each time, and the instructions of each case."""
    plugin = pytestconfig.pluginmanager.get_plugin("tests.emulator.plugin")
    emulation: Emulation = plugin.emulation  # type: ignore[union-attr]
    reached = [program.reached.copy() for program in emulation.programs]
    found = survey(emulation, CORE)
    for program, before in zip(emulation.programs, reached, strict=False):
        program.reached[:] |= before
    return found


@pytest.fixture
def faulty(emulation: Emulation) -> Iterator[Emulation]:
    """The emulation; the plugin does not see the reports of faults."""
    yield emulation
    emulation.launches.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_detected(faulty: Emulation, surveyed: Surveyed, kind: str) -> None:
    found, cost = surveyed
    places = [place for place in found if place.kind == kind]
    if not places:
        pytest.skip(f"no kernel of {faulty.chip} has a place for it")
    drawn = random.Random(f"{commit()} {kind}").sample(places, min(MOST, len(places)))
    detected = any(attempt(faulty, place, cost) for place in drawn)
    faulty.launches.clear()
    assert detected, [(place.program.name, place.record) for place in drawn]


def test_the_table_of_faults() -> None:
    """It has 150 faults of each chip, nine of ten detected, and a reason for each other one."""
    for chip in ("sm_80", "sm_90"):
        rows = [row for row in table() if row.chip == chip]
        assert len(rows) == 150
        assert sum(bool(row.detected) for row in rows) >= 143
        assert [row for row in rows if not row.detected and not row.reason] == []
        of_hopper = {"fence removed", "dependent's wait removed"}
        assert {row.kind for row in rows} == {*KINDS} - (of_hopper if chip == "sm_80" else set())
