"""Compiles every shipped config for every chip, without a GPU, and says what it uses.

``python -m tests.support.aot.compile_kernels --write`` writes `docs/kernel_resources.csv`;
``--arch sm_90`` (repeatable) prints the rows of one chip. The tests add ``--known``: a kernel whose
Triton IR is what a row of the table was made from gives that row, but for every tenth, which is
compiled (`fingerprints.py`). What is compiled is what a GPU would be given: launches as their
launchers make them (`launches.py`), specialised by the rules of Triton's own launcher.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import triton
from triton.compiler import ASTSource

from tests.support.aot.fingerprints import fingerprint, is_sampled
from tests.support.aot.launches import CHIPS, Case, Compiled, Launch, cases, record
from tests.support.aot.resources import Resources, key_of, resources_of
from tests.support.aot.specialisation import specialise, target_of

TABLE = Path(__file__).parents[3] / "docs" / "kernel_resources.csv"


@functools.cache
def read_table(path: Path = TABLE) -> dict[str, Resources]:
    """Returns the table's rows by fingerprint; none of another Triton's, or with other columns."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Resources)}
    with path.open(newline="") as file:
        if file.readline().split() != ["#", "triton", triton.__version__]:
            return {}
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kinds):
            return {}
        rows = list(reader)
    return {
        row["fingerprint"]: Resources(**{name: kinds[name](row[name]) for name in kinds})
        for row in rows
    }


def write_table(rows: Sequence[Resources], path: Path = TABLE) -> None:
    """Writes the rows as CSV, after one comment line with Triton's version."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles a launch as Triton's launcher would specialise it."""
    *known, options = specialise(launch, arch)
    source = ASTSource(launch.kernel, *known)
    kernel = triton.compile(source, target=target_of(arch), options=options)
    return Compiled(kernel.asm, kernel.metadata.shared)


def fingerprint_of(launch: Launch, arch: str) -> str:
    """Returns the fingerprint of what `compile_launch` would compile."""
    *known, options = specialise(launch, arch)
    return fingerprint(ASTSource(launch.kernel, *known), target_of(arch), options)


def measure(cases: Sequence[Case], known: frozenset[str]) -> list[Resources]:
    """Returns the resources of each case.

    Where its fingerprint is known, and not sampled, its row is read from the table.
    """
    rows = []
    for case in cases:
        launch = record(case)
        digest = fingerprint_of(launch, case.arch)
        if digest in known and not is_sampled(digest):
            rows.append(replace(read_table()[digest], **key_of(case)))
        else:
            rows.append(resources_of(case, launch, compile_launch(launch, case.arch), digest))
    return rows


def measure_all(selected: Sequence[Case], known: bool = False) -> list[Resources]:
    """Returns the resources of each case, in order, from a pool with one worker a core."""
    measured = functools.partial(measure, known=frozenset(read_table()) if known else frozenset())
    # What one worker makes in a row: kernels of the same Triton IR, which is made once for them.
    alike: dict[tuple[str, str], list[Case]] = {}
    for case in selected:
        told = repr(specialise(record(case), case.arch))
        alike.setdefault((case.shipped.kernel, told), []).append(case)
    # Torch and Triton, alive to the end, need not be looked through at every collection.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), initializer=gc.freeze) as pool:
        rows = {
            case: row
            for group, made in zip(alike.values(), pool.map(measured, alike.values()), strict=True)
            for case, row in zip(group, made, strict=True)
        }
    return [rows[case] for case in selected]


def main(arguments: Sequence[str]) -> int:
    """Compiles, and prints the rows or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=[chip.arch for chip in CHIPS])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--known", action="store_true", help="take what is known from the table")
    options = parser.parse_args(arguments)
    chips = [chip for chip in CHIPS if options.arch is None or chip.arch in options.arch]
    rows = measure_all(cases(chips), options.known)
    if options.write:
        write_table(rows)
    else:
        writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
