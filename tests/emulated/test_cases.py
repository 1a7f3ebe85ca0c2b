"""Every case in three orders: values, equal bits, no report; and what of each kernel ran.

The emulator's plugin fails a test in which a check reports something.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from fastlora.kernels.chips import chip_of
from fastlora.kernels.config_tables import kernel_of, table_of
from tests.emulated.cases import CASES, CORE, FURTHER
from tests.emulated.orders import check_orders
from tests.emulator.driver import Emulation
from tests.support.kernels.lab import Lab

# Of the further cases the lane runs a part, as its time allows.
DRAWN = [pytest.param(name, marks=pytest.mark.drawn(0.5)) for name in FURTHER]
LEAST = 0.9
TABLE = Path(__file__).with_name("coverage.csv")
_ran: set[str] = set()


class Coverage(NamedTuple):
    """How much of a kernel ran: a row of the table, in its order of columns.

    A variant is what Triton compiled for one set of constants, dtypes and alignments. ``reachable``
    instructions are those that a launch without a trap can execute, of all variants that the cases
    launch. ``reached`` are those that a lane of any launch executed.
    """

    triton: str
    chip: str
    kernel: str
    variants: int
    reached: int
    reachable: int

    @property
    def share(self) -> float:
        """What ran, from 0 to 1."""
        return self.reached / self.reachable


def shipped_kernels() -> set[str]:
    """Returns the kernels of all launches that the chip's table knows."""
    launches = {launch for launch, _ in table_of(chip_of(Lab().device))}
    return {f"_{kernel_of(launch)}_kernel" for launch in launches}


def covered(emulation: Emulation) -> list[Coverage]:
    """Returns what ran of each kernel so far."""
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for program in emulation.programs:
        counts[program.name].append(program.coverage())
    about = triton.__version__, emulation.chip
    return [
        Coverage(*about, name, len(own), *(sum(column) for column in zip(*own, strict=True)))
        for name, own in sorted(counts.items())
    ]


@pytest.mark.parametrize("name", [*CORE, *DRAWN])
def test_values_and_bits(emulation: Emulation, name: str) -> None:
    _ran.add(name)
    check_orders(emulation, CASES[name])


def test_every_kernel_ran(emulation: Emulation) -> None:
    """The cases that run each time launch every kernel that the library's table names."""
    if not _ran.issuperset(CORE):
        pytest.skip("not all of the cases that run each time were asked for")
    assert {launch.kernel for launch in emulation.launches} >= shipped_kernels()


def test_coverage(emulation: Emulation) -> None:
    """Of every kernel `LEAST` of the reachable instructions ran; the table has the figures.

    ``EMULATE_WRITE=1`` writes them.
    """
    if _ran != CASES.keys():
        pytest.skip("only some of the cases ran")
    found = covered(emulation)
    others = [row for row in table() if (row.triton, row.chip) != found[0][:2]]
    if os.environ.get("EMULATE_WRITE"):
        with TABLE.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*Coverage._fields, "percent"))
            writer.writerows((*row, f"{100 * row.share:.1f}") for row in sorted(others + found))
    assert {row.kernel for row in found} == shipped_kernels()
    assert [row for row in found if row.share < LEAST] == []
    known = {row.kernel: row.share for row in table() if row[:2] == found[0][:2]}
    # A point less than the table says is worth a look at the cases.
    assert [row for row in found if row.share < known.get(row.kernel, LEAST) - 0.01] == []


def test_the_table_has_every_kernel() -> None:
    """Of both chips of the lane; `test_coverage` needs all cases, which the lane does not run."""
    for chip in ("sm_80", "sm_90"):
        own = [row for row in table() if row.chip == chip]
        assert {row.kernel for row in own} == shipped_kernels()
        assert min(row.share for row in own) >= LEAST


def table() -> list[Coverage]:
    """Returns the rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    return [Coverage(*row[:3], *(int(number) for number in row[3:6])) for row in rows]
