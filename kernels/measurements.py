"""Measured rows: their files, which `bench/tune.py` writes, and their place in the tables.

A folder has one file of rows (`row_files`) per chip, ``<arch>.json``, which begins with the card,
versions, and commit. The folder ``measured`` is next to this module. It does not have to exist: no
measurements are shipped yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlora import env
from fastlora.kernels.chips import Chip
from fastlora.kernels.config_files import FileRow
from fastlora.kernels.config_tables import (
    MEASURED,
    PLANNED,
    config_of_row,
    cuts_rows,
    is_valid,
    max_splits,
    table_of,
)


def folder() -> Path:
    """Return the folder of the files: ``FASTLORA_MEASURED``, or the installed folder."""
    return env.measured_configs_folder() or Path(__file__).parent / "measured"


def files() -> Iterator[tuple[str, Path]]:
    """Yield the arch and the path of each file."""
    for path in sorted(folder().glob("*.json")):
        yield path.stem, path


def put_first(arch: str, measured: Sequence[FileRow], source: object) -> None:
    """Put measurements in front of all rows of one arch.

    Earlier results of `choose` and `plan_of`, and cached launches, do not change.

    Args:
        arch: As in `Chip`.
        measured: The rows, in the order of precedence.
        source: Their origin, for the error message.

    Raises:
        ValueError: The arch cannot run a row, or there are no configs for the arch.
    """
    chip = Chip(arch, 1)
    table = dict(table_of(chip))
    for number, measurement in reversed(list(enumerate(measured))):
        if fault := fault_of(chip, measurement):
            raise ValueError(f"{source}, row {number}: {fault}")
        key = measurement.launch, measurement.kind
        table[key] = (measurement.row, *table[key])
    MEASURED[arch] = table


def fault_of(chip: Chip, measured: FileRow) -> str:
    """Return the reason why a measurement cannot be in the chip's table, or ""."""
    launch, kind, row = measured
    candidates = [r for r in table_of(chip).get((launch, kind), ()) if not r.is_measured]
    if not candidates:
        return f"there is no launch {launch!r} of the kind {kind!r}"
    if not row.is_measured:
        return "it covers no problem, expected max_m, n, k or max_r"
    if row.plan:
        fits = launch in PLANNED and not row.num_warps
        return "" if fits else f"{launch} has no plan, or the row has a tile as well"
    sides = ("block_m", "block_n", "block_k", "blocks_r")
    if any(bool(getattr(row, side)) != bool(getattr(candidates[0], side)) for side in sides):
        return f"the tile of {launch} has other sides, as in {candidates[0]}"
    sizes = {r.block_m for r in candidates}
    if not cuts_rows(launch) and row.block_m not in sizes:
        return f"block_m is {row.block_m}, expected one of {sorted(sizes)}"
    if row.splits > max_splits(launch):
        return f"splits is {row.splits}, expected at most {max_splits(launch)}"
    if not row.num_stages:
        return "num_stages is 0"
    width = 2 if kind == "half" else 4
    for block_r in row.blocks_r or (0,):
        if not is_valid(chip, launch, config_of_row(chip, launch, kind, row, block_r), width):
            return f"{launch} cannot run as {row} on {chip.arch}"
    return ""
