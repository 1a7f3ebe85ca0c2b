"""Compiles every shipped config for every chip, without a GPU, and says what it uses.

``python -m tests.support.aot.compile_kernels --write`` writes `docs/kernel_resources.csv`;
``--arch sm_90`` (repeatable) prints the rows of one chip. The tests add ``--shared``: chips that
compile alike up to a stage share it (`shared_compiles.py`); and ``--known``: a kernel whose Triton
IR is what a row of the table was made from gives that row, but for every tenth, which is compiled
(`fingerprints.py`). What is compiled is what a GPU would be given: launches as their launchers make
them (`launches.py`), specialised by the rules of Triton's own launcher.
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
from typing import Any

import triton
from triton.compiler import ASTSource

from tests.support.aot.fingerprints import fingerprint, is_sampled
from tests.support.aot.launches import CHIPS, Case, Launch, cases, record
from tests.support.aot.resources import Resources, key_of, resources_of
from tests.support.aot.shared_compiles import Compiled, compile_for, donor_of, groups_of
from tests.support.aot.specialisation import specialise, target_of
from tests.support.aot.table import TABLE, read_table, write_table


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compiles a launch as Triton's launcher would specialise it; returns the compiled kernel."""
    *known, options = specialise(launch, arch)
    source = ASTSource(launch.kernel, *known)
    return triton.compile(source, target=target_of(arch), options=options)


def fingerprint_of(launch: Launch, arch: str) -> str:
    """Returns the fingerprint of what `compile_launch` would compile."""
    *known, options = specialise(launch, arch)
    return fingerprint(ASTSource(launch.kernel, *known), target_of(arch), options)


def measure_group(group: Sequence[Case], known: frozenset[str] = frozenset()) -> list[Resources]:
    """Compiles cases of one specialisation, each from what an earlier one's chip compiles alike.

    Where all fingerprints are known, and none is sampled, their rows are read from the table.
    """
    launches = [record(case) for case in group]
    prints = [
        fingerprint_of(launch, case.arch) for launch, case in zip(launches, group, strict=True)
    ]
    if known.issuperset(prints) and not is_sampled(prints[0]):
        table = read_table()
        return [
            replace(table[digest], **key_of(case))
            for digest, case in zip(prints, group, strict=True)
        ]
    made: dict[str, Compiled] = {}
    rows = []
    for case, launch, digest in zip(group, launches, prints, strict=True):
        found = donor_of(case.arch, made)
        if found is None:
            kernel = compile_launch(launch, case.arch)
            compiled = Compiled(kernel.asm, kernel.metadata.shared)
        else:
            options = specialise(launch, case.arch).options
            compiled = compile_for(target_of(case.arch), *found, options)
        made[case.arch] = compiled
        rows.append(resources_of(case, launch, compiled, digest))
    return rows


def _measure_groups(groups: Sequence[Sequence[Case]], known: frozenset[str]) -> list[Resources]:
    """Returns the resources of the cases of several groups."""
    return [row for group in groups for row in measure_group(group, known)]


def measure_all(
    selected: Sequence[Case], shared: bool = False, known: bool = False
) -> list[Resources]:
    """Returns the resources of each case, in order, from a pool with one worker a core."""
    measure = functools.partial(
        _measure_groups, known=frozenset(read_table()) if known else frozenset()
    )
    told = {case: repr(specialise(record(case), case.arch)) for case in selected}
    groups: Sequence[Sequence[Case]] = [[case] for case in selected]
    if shared:
        groups = groups_of(selected, told.__getitem__)
    # What one worker makes in a row: kernels of the same Triton IR, which is made once for them.
    alike: dict[tuple[str, str], list[Sequence[Case]]] = {}
    for group in groups:
        alike.setdefault((group[0].shipped.kernel, told[group[0]]), []).append(group)
    # Torch and Triton, alive to the end, need not be looked through at every collection.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), initializer=gc.freeze) as pool:
        rows = dict(
            zip(
                (case for groups in alike.values() for group in groups for case in group),
                (row for made in pool.map(measure, alike.values()) for row in made),
                strict=True,
            )
        )
    return [rows[case] for case in selected]


def main(arguments: Sequence[str]) -> int:
    """Compiles, and prints the rows or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=[chip.arch for chip in CHIPS])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--shared", action="store_true", help="share stages between chips")
    parser.add_argument("--known", action="store_true", help="take what is known from the table")
    options = parser.parse_args(arguments)
    chips = [chip for chip in CHIPS if options.arch is None or chip.arch in options.arch]
    rows = measure_all(cases(chips), options.shared, options.known)
    if options.write:
        write_table(rows)
    else:
        writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
