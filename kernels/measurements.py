"""Files of measured rows, which `bench/tune.py` writes and `fastlora.kernels.configs` reads.

A folder holds one file of JSON for each chip, ``<arch>.json``: card, versions and commit, and
``rows`` in the order in which they are asked. A row names its launch, its kind, and the columns of
`chips.Row` that are not the default. Columns of ``NOTES`` are for readers.

The folder ``measured`` lies beside this file. It may be absent: nothing is shipped yet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastlora import env
from fastlora.kernels.chips import Row

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
