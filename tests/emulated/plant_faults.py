"""Plants faults in the kernels that the cases launch, and says which of them are detected.

    EMULATE=sm_90 python -m tests.emulated.plant_faults [--count 150] [--only WORD]

A fixed seed draws them: one of each kernel and kind, then a second one of each, and so on. Cases
run on tensors that have NaN between their rows, and end where their storage ends. A fault is
detected by a report, by a launch that is given up, by values beyond the budget, or by bits that
differ between the orders of warps and programs. One that is not detected needs a reason.
`planted_faults.csv` has the faults. A reason that was written there stays as long as its fault.

A fault is drawn from what `cases` reach, and tried in `other_sizes`, too: many a fault reads behind
a row, and only the last row of a tensor has nothing behind it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.emulator.decode import Program
from tests.emulator.driver import Emulation
from tests.emulator.execute import ORDERS
from tests.emulator.faults import KINDS, places, plant
from tests.support.kernels import lab

TABLE = Path(__file__).with_name("planted_faults.csv")
SEED = 1
# A launch is given up behind so many instructions of the same case without a fault.
PATIENCE = 5
# Cases without padding: all operands of sums are contiguous.
without_padding: set[str] = set()


class PaddedLab(lab.Lab):
    """Makes matrices with NaN behind each row; nothing lies behind the last one.

    Narrow ones are contiguous, as kernels want operands with a column for each rank row.
    """

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values, in rows that are 16 elements longer: strides stay multiples of 16."""
        values = super().rand(*shape, dtype=dtype)
        if len(shape) != 2 or shape[1] < 48 or not values.numel():
            return values
        rows, columns = shape
        wide = torch.full((rows * (columns + 16) - 16,), float("nan"), dtype=dtype)
        return wide.as_strided((rows, columns), (columns + 16, 1)).copy_(values)


class Place(NamedTuple):
    """Where a fault is planted: a kind and a record of a program, in cases by their cost."""

    program: Program
    kind: str
    record: int
    cases: tuple[str, ...]


class Row(NamedTuple):
    """One fault: a row of the table, in its order of columns."""

    chip: str
    kernel: str
    variant: str
    kind: str
    line: int
    instruction: str
    source: str
    detected: str
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others, as text."""
        return tuple(str(value) for value in self[:5])


def cases() -> dict[str, Callable[[lab.Lab], dict[str, torch.Tensor]]]:
    """Returns the cases, which are imported once the emulator runs."""
    from tests.emulated import cases as known

    fp16, factors = known.FP16, known.FACTORS
    small = {"planes": (8, 4, 12, 8), "sizes": (77, 33, 130, 65)}
    return {
        **known.CASES,
        # Loops that go around their buffers more often, and outputs that end early.
        "shrink, long": known.one("shrink", (40, 1, 1240, 16), p=0.3, splits=2),
        "shrink, fp16, long": known.one("shrink", (33, 1, 1333, 5), fp16, splits=2, **factors),
        "linear, long": known.one("linear", (17, 72, 1032, 16)),
        "grad_x, long": known.one("grad_x", (17, 1032, 72, 16), p=0.3),
        "grad_b, long": known.one("grad_b", (530, 72, 1, 16), splits=1),
        "grad_a, long": known.one("grad_a", (530, 1, 72, 16), p=0.3, further_ranks=(8,), splits=1),
        "mixed linear, long": known.mixed("linear", (17, 72, 1032), ranks=known.SERVED),
        "mixed shrink, long": known.mixed("shrink", (17, 1, 1032), ranks=known.SERVED),
        "mixed step, few rows": known.step((5, 600, 70), dropout=True),
        "mixed step, fp16, few rows": known.step((5, 600, 64), fp16, "split"),
        "mixed step, fp32, few rows": known.step((5, 300, 48), known.FP32),
        "codes, fp4, more rows": known.quantized("fp4", (17, 45, 192, 8)),
        "mixed sort, more rows": known.sort(300, 1, 40, 16),
        "sums of planes, small": known.sums(**small),
        "sums of planes, small, fp32": known.sums(known.FP32, **small),
    }


def other_sizes() -> dict[str, Callable[[lab.Lab], dict[str, torch.Tensor]]]:
    """Returns cases from which no faults are drawn; those that `cases` do not show are tried here.

    In most of them the lane that a fault concerns has the last row of a tensor.
    """
    from tests.emulated import cases as known

    fp16, fp32, nested = known.FP16, known.FP32, "nf4 nested"
    return {
        "grad_a, 33 rows": known.one("grad_a", (33, 1, 300, 16), p=0.3, further_ranks=(8,)),
        "shrink, fp32, 5 rows": known.one("shrink", (5, 1, 200, 5), fp32, splits=5),
        "codes, nf4 nested, long": known.quantized(nested, (64, 33, 1280, 40)),
        "codes, nf4 nested, 5 outputs": known.quantized(nested, (64, 5, 320, 40)),
        "shrink, one row for all": known.one("shrink", (33, 1, 128, 16), p=0.3, expanded=True),
        "mixed codes, rank of 1": known.mixed_quantized(nested, 21, 9, cycle=(1, 3, 0, 16)),
        "mixed sort, 7 slots": known.sort(40, 1, 7, 16),
        # Rows of the last slot end with the batch, and so does their last piece.
        **{
            f"mixed step, last slot, {m} rows": known.step((m, 600, 70), dropout=True, most=6)
            for m in (130, 138)
        },
        **{
            f"mixed step, fp32 factors, {m} rows": known.step(
                (m, 300, 64), factor_dtype=fp32, dropout=True, most=6, run_rows=run_rows
            )
            for m, run_rows in ((148, 64), (168, 16))
        },
        "mixed step, fp16, 3 outputs": known.step((138, 3, 64), fp16, "split", most=6),
        "mixed step, fp32, 3 outputs": known.step((130, 3, 48), fp32, most=6),
        "mixed step, rank 11": known.step(
            (45, 600, 70), dropout=True, ranks=(1, 3, 8, 11, 64, 0, 16)
        ),
        "mixed step, fp16, rank 200": known.step(
            (45, 64, 64), fp16, "split", ranks=(1, 3, 8, 16, 200, 0, 16)
        ),
    }


def run(emulation: Emulation, case: str) -> tuple[dict[str, torch.Tensor], str]:
    """Runs a case; returns its results, and the first thing that tells of a fault."""
    emulation.launches.clear()
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    error = ""
    try:
        made = lab.Lab() if case in without_padding else PaddedLab()
        found = {**cases(), **other_sizes()}[case](made)
    except (AssertionError, RuntimeError) as raised:
        error = f"values: {(str(raised) or 'an assertion').splitlines()[0][:80]}"
    reports = [report.split(" in _")[0] for report in emulation.reports]
    return found, next(iter(reports), error)


def detect(emulation: Emulation, case: str, orders: Sequence[int] = ORDERS) -> str:
    """Runs a case in some orders; returns what tells of a fault, and nothing without one."""
    first: dict[str, torch.Tensor] | None = None
    for emulation.order in orders:
        found, told = run(emulation, case)
        if told:
            return told if emulation.order == ORDERS[0] else f"order {emulation.order}: {told}"
        bits = {key: t.contiguous().view(torch.uint8) for key, t in found.items() if t.numel()}
        first = first or bits
        if any(not torch.equal(own, first[key]) for key, own in bits.items()):
            return f"bits differ in order {emulation.order}"
    return ""


def survey(
    emulation: Emulation, names: Iterable[str], only: str = ""
) -> tuple[list[Place], dict[str, int]]:
    """Runs cases without faults; returns the places, and the instructions of each case."""
    where: dict[tuple[Program, str, int], list[str]] = defaultdict(list)
    cost: dict[str, int] = {}
    for case in names:
        for program in emulation.programs:
            program.reached[:] = 0
        told = detect(emulation, case, ORDERS[:1])
        if told:
            print(f"{case} runs without padding: {told}", flush=True)
            without_padding.add(case)
            told = detect(emulation, case, ORDERS[:1])
        if told:
            raise RuntimeError(f"{case} on {emulation.chip} without a fault: {told}")
        cost[case] = max(launch.instructions for launch in emulation.launches)
        for program in emulation.programs:
            if program.reached.any() and only in program.name:
                for kind, records in places(program).items():
                    for record in records:
                        where[program, kind, record].append(case)
    found = [
        Place(*key, tuple(sorted(own, key=lambda case: cost[case]))) for key, own in where.items()
    ]
    return found, cost


def draw(found: list[Place], count: int) -> Iterator[Place]:
    """Yields places: one of each kernel and kind, then a second one of each, and so on."""
    chance = random.Random(SEED)
    groups: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for place in found:
        groups[place.program.name, place.kind].append(place)
    order = sorted(groups)
    chance.shuffle(order)
    for key in order:
        chance.shuffle(groups[key])
    rounds = itertools.zip_longest(*(groups[key] for key in order))
    drawn = (place for places_of_round in rounds for place in places_of_round if place)
    return itertools.islice(drawn, count)


def describe(chip: str, place: Place, detected: str) -> Row:
    """Returns the row of a fault, without a reason."""
    program, line = place.program, place.program.text_lines[place.record]
    record = program.code[place.record]
    text = " ".join(program.text.split("\n")[line].split("//")[0].split())
    source = f"{program.files.get(int(record['file']), '')}:{record['line']}"
    # Behind the kernel stand the paths of its sources, which depend on the checkout.
    kernel = program.text.partition("\n\t.file")[0]
    variant = hashlib.sha256(kernel.encode()).hexdigest()[:8]
    about = chip, program.name, variant, place.kind, line + 1, text[:60], source
    return Row(*about, detected, "")


def attempt(emulation: Emulation, place: Place, cost: dict[str, int]) -> str:
    """Tries a fault in cases that execute its instruction; returns what tells of it."""
    faulty = plant(place.program, place.kind, place.record)
    emulation.replacements = {place.program: faulty}
    told = ""
    for case in place.cases:
        emulation.limit = PATIENCE * cost[case]
        told = detect(emulation, case)
        if told:
            told = f"{told} ({case})"
            break
    emulation.replacements, emulation.limit, emulation.order = {}, 0, ORDERS[0]
    return told


def try_faults(emulation: Emulation, count: int, only: str) -> Iterator[Row]:
    """Draws faults, and yields each once it was tried."""
    found, cost = survey(emulation, cases(), only)
    drawn = list(draw(found, count))
    further, further_cost = survey(emulation, other_sizes(), only)
    cost |= further_cost
    others: dict[Program, set[str]] = defaultdict(set)
    for program, _, _, names in further:
        others[program].update(names)
    for place in drawn:
        tried = (*place.cases, *sorted(others[place.program], key=lambda case: cost[case]))
        told = attempt(emulation, place._replace(cases=tried), cost)
        yield describe(emulation.chip, place, told)


def table() -> list[Row]:
    """Returns the rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    return [Row(*row[:4], int(row[4]), *row[5:]) for row in rows]


def write(chip: str, rows: list[Row]) -> None:
    """Writes a chip's rows of the table."""
    others = [row for row in table() if row.chip != chip]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Row._fields, *sorted(others + rows)])


def main() -> None:
    """Tries the faults of a chip, and writes its rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=150, help="of faults")
    parser.add_argument("--only", default="", help="a part of the kernels' names")
    options = parser.parse_args()
    from tests.emulator.plugin import emulation

    reasons = {row.key: row.reason for row in table()}
    rows = []
    for row in try_faults(emulation, options.count, options.only):
        rows.append(row._replace(reason="" if row.detected else reasons.get(row.key, "")))
        print(*rows[-1], sep=" | ", flush=True)
    if not options.only:
        write(emulation.chip, rows)
    for kind in KINDS:
        own = [row for row in rows if row.kind == kind]
        print(f"{kind}: {sum(bool(row.detected) for row in own)} of {len(own)} detected")
    open_ones = sum(not row.detected and not row.reason for row in rows)
    print(f"{sum(bool(row.detected) for row in rows)} of {len(rows)} detected,", end=" ")
    print(f"{open_ones} of the others have no reason")


if __name__ == "__main__":
    main()
