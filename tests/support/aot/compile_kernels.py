"""Compiles every shipped config for every chip, without a GPU, and says what it uses.

``python -m tests.support.aot.compile_kernels --write --known --older FOLDER`` writes
`docs/kernel_resources.csv`; ``--arch sm_90`` (repeatable) prints the rows of one chip. FOLDER holds
the older Triton that the table covers too (``pip install --no-deps --target FOLDER
triton==3.6.0``); without it the table's rows of that Triton stay, and a test says whether they are
still of today's kernels. With ``--known``, as the tests run it, a kernel whose Triton IR is what a
row of the table was made from gives that row, but for one in a hundred, which is compiled
(`fingerprints.py`). What is compiled is what a GPU would be given: launches as their launchers make
them (`launches.py`), specialized by the rules of Triton's own launcher.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TextIO

import torch
import triton
from triton.compiler import ASTSource

from tests.support.aot.fingerprints import fingerprint, is_sampled
from tests.support.aot.launches import CHIPS, Case, Compiled, Launch, cases, record
from tests.support.aot.resources import Resources, key_of, resources_of
from tests.support.aot.specialization import TYPE_NAMES, specialize, target_of

TABLE = Path(__file__).parents[3] / "docs" / "kernel_resources.csv"
# Of codes. Where the others stand, every row of the table would have to be measured again.
TYPE_NAMES |= {torch.uint8: "u8", torch.int8: "i8"}
# What PyTorch 2.11 comes with, and the chips that its rows are of.
OLDER = "3.6.0"
OLDER_CHIPS = [chip for chip in CHIPS if chip.arch in ("sm_80", "sm_90")]


@functools.cache
def read_table(path: Path = TABLE) -> list[Resources]:
    """Returns the table's rows; none of one with other columns."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Resources)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kinds):
            return []
        return [
            Resources(**{key: kinds[key](value) for key, value in row.items()}) for row in reader
        ]


def rows_of(version: str) -> dict[str, Resources]:
    """Returns the table's rows of one Triton by fingerprint."""
    return {row.fingerprint: row for row in read_table() if row.triton == version}


def write_rows(rows: Sequence[Resources], file: TextIO) -> None:
    """Writes rows as CSV."""
    writer = csv.DictWriter(file, [field.name for field in fields(Resources)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles a launch as Triton's launcher would specialize it."""
    *known, options = specialize(launch, arch)
    source = ASTSource(launch.kernel, *known)
    kernel = triton.compile(source, target=target_of(arch), options=options)
    return Compiled(kernel.asm, kernel.metadata.shared)


def fingerprint_of(launch: Launch, arch: str) -> str:
    """Returns the fingerprint of what `compile_launch` would compile."""
    *known, options = specialize(launch, arch)
    return fingerprint(ASTSource(launch.kernel, *known), target_of(arch), options)


def measure(cases: Sequence[Case], known: bool) -> list[Resources]:
    """Returns the resources of each case.

    With ``known`` a row is read from the table where it has the fingerprint, which is not sampled.
    """
    rows = []
    for case in cases:
        launch = record(case)
        digest = fingerprint_of(launch, case.arch)
        row = None if is_sampled(digest) or not known else rows_of(triton.__version__).get(digest)
        rows.append(replace(row, **key_of(case)) if row else compile_case(case, digest))
    return rows


def compile_case(case: Case, digest: str) -> Resources:
    """Returns the resources of a case, whose fingerprint is ``digest``."""
    launch = record(case)
    return resources_of(case, launch, compile_launch(launch, case.arch), digest)


def measure_all(selected: Sequence[Case], known: bool = False) -> list[Resources]:
    """Returns the resources of each case, in order, from a pool with one worker a core."""
    # What one worker makes in a row: kernels of the same Triton IR, which is made once for them.
    alike: dict[tuple[str, str], list[Case]] = {}
    for case in selected:
        told = repr(specialize(record(case), case.arch))
        alike.setdefault((case.shipped.kernel, told), []).append(case)
    # Torch and Triton, alive to the end, need not be looked through at every collection.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), initializer=gc.freeze) as pool:
        made = pool.map(functools.partial(measure, known=known), alike.values())
        rows = {
            case: row
            for group, found in zip(alike.values(), made, strict=True)
            for case, row in zip(group, found, strict=True)
        }
    return [rows[case] for case in selected]


def measure_older(
    selected: Sequence[Case], rows: Sequence[Resources], folder: Path, known: bool
) -> list[Resources]:
    """Returns the older Triton's rows of cases, beside today's ``rows`` of them.

    They get today's fingerprints: where today's IR stays, the older Triton's stays as well.
    """
    table = rows_of(OLDER) if known else {}
    # Workers that start anew import Triton from the folder, which is in front of the path.
    sys.path.insert(0, str(folder.resolve(strict=True)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=spawn) as pool:
        made = {
            case: pool.submit(compile_case, case, row.fingerprint)
            for case, row in zip(selected, rows, strict=True)
            if row.fingerprint not in table
        }
        result = [
            made[case].result() if case in made else replace(table[row.fingerprint], **key_of(case))
            for case, row in zip(selected, rows, strict=True)
        ]
    if others := {row.triton for row in result} - {OLDER}:
        raise RuntimeError(f"{folder} has Triton {others}, expected {OLDER}")
    return result


def main(arguments: Sequence[str]) -> int:
    """Compiles, and prints the rows or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=[chip.arch for chip in CHIPS])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--known", action="store_true", help="take what is known from the table")
    parser.add_argument("--older", type=Path, help=f"folder that Triton {OLDER} is in")
    options = parser.parse_args(arguments)
    chips = [chip for chip in CHIPS if options.arch is None or chip.arch in options.arch]
    rows = measure_all(cases(chips), options.known)
    covered = [chip for chip in OLDER_CHIPS if chip in chips]
    archs = [chip.arch for chip in covered]
    if options.older:
        today = [row for row in rows if row.arch in archs]
        older = measure_older(cases(covered), today, options.older, options.known)
    else:
        older = [row for row in read_table() if row.triton == OLDER and row.arch in archs]
    if options.write:
        with TABLE.open("w", newline="") as file:
            write_rows([*rows, *older], file)
    else:
        write_rows([*rows, *older], sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
