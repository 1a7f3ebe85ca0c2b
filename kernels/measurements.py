"""Measured rows: files of them, which `bench/tune.py` writes, and their place in the tables.

A folder holds one file of JSON for each chip, ``<arch>.json``: card, versions and commit, and
``rows`` in the order in which they are asked. A row names its launch, its kind, and the columns of
`chips.Row` that are not the default. Columns of ``NOTES`` are for readers.

The folder ``measured`` lies beside this file. It may be absent: nothing is shipped yet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora import env
from fastlora.kernels.chips import Chip, Row
from fastlora.kernels.tables import (
    MEASURED,
    PLANNED,
    config_of_row,
    cuts_rows,
    is_valid,
    max_splits,
    table_of,
)

NOTES = ("us", "shipped_us", "problem")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Row)}


class Measurement(NamedTuple):
    """A row of a file, and the launch and kind in whose table it belongs."""

    launch: str
    kind: str
    row: Row


def folder() -> Path:
    """Returns where the files lie: ``FASTLORA_MEASURED``, or what is installed."""
    return env.measured_folder() or Path(__file__).parent / "measured"


def files() -> Iterator[tuple[str, Path]]:
    """Yields the arch and the path of each file."""
    for path in sorted(folder().glob("*.json")):
        yield path.stem, path


def read(path: Path) -> list[Measurement]:
    """Returns the rows of a file.

    Raises:
        ValueError: It is no JSON, or a row has an unknown column or a value of another type.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of measured rows: {error!r}") from error
    found = []
    for number, columns in enumerate(rows):
        try:
            found.append(_measurement(dict(columns)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return found


def columns_of(measurement: Measurement) -> dict[str, Any]:
    """Returns what `read` turns back into the measurement."""
    launch, kind, row = measurement
    own = {name: value for name, value in vars(row).items() if value != _DEFAULTS[name]}
    return {"launch": launch, "kind": kind, **own}


def put_first(arch: str, measured: Sequence[Measurement], source: object) -> None:
    """Puts measurements in front of all rows of an arch, and of no other one.

    What `choose` and `plan_of` answered before, and launches that were kept, stay as they are.

    Args:
        arch: As in `Chip`.
        measured: The rows, in the order in which they are asked.
        source: Where they come from, for the error.

    Raises:
        ValueError: A row is none that the arch can run, or there are no configs for the arch.
    """
    chip = Chip(arch, 1)
    table = dict(table_of(chip))
    for number, measurement in reversed(list(enumerate(measured))):
        if fault := fault_of(chip, measurement):
            raise ValueError(f"{source}, row {number}: {fault}")
        key = measurement.launch, measurement.kind
        table[key] = (measurement.row, *table[key])
    MEASURED[arch] = table


def fault_of(chip: Chip, measured: Measurement) -> str:
    """Returns why a measurement cannot stand in the chip's table, or ""."""
    launch, kind, row = measured
    candidates = [r for r in table_of(chip).get((launch, kind), ()) if not r.is_measured]
    if not candidates:
        return f"there is no launch {launch!r} of the kind {kind!r}"
    if not row.is_measured:
        return "it says for no problem, expected max_m, n, k or max_r"
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


def _measurement(columns: dict[str, Any]) -> Measurement:
    launch, kind = (columns.pop(name, None) for name in ("launch", "kind"))
    for name, value in list(columns.items()):
        if name in NOTES:
            del columns[name]
        elif name not in _DEFAULTS:
            raise ValueError(f"unknown column {name!r}, expected one of {list(_DEFAULTS)}")
        elif name == "blocks_r":
            columns[name] = tuple(value)
            if not value or not all(type(block) is int for block in value):
                raise ValueError(f"blocks_r is {value!r}, expected a list of whole numbers")
        elif name == "plan":
            if value not in ("fused", "split"):
                raise ValueError(f"plan is {value!r}, expected 'fused' or 'split'")
        elif type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, expected a whole number")
    return Measurement(str(launch), str(kind), Row(**columns))
