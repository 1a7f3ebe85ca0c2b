"""Files of rows: JSON with ``rows``, one per line, in order of precedence.

A row names its launch, its kind, and the columns of `chips.Row` that differ from the default. The
columns in ``NOTES`` are for readers, and so are other entries of a file, except for ``like`` in a
file of candidates (`fastlora.kernels.config_tables`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.kernels.chips import ConfigRow

NOTES = ("us", "shipped_us", "problem", "why")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ConfigRow)}


class FileRow(NamedTuple):
    """A table row that was read from a file, and the launch and kind that it applies to."""

    launch: str
    kind: str
    row: ConfigRow


def read(path: Path) -> tuple[list[FileRow], str]:
    """Return the rows of a file, and the name of another file that it is like, or "".

    Raises:
        ValueError: The file is not JSON, or a row has an unknown column or a value of the wrong
            type.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        rows, like = text["rows"], text.get("like", "")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of measured rows: {error!r}") from error
    found = []
    for number, columns in enumerate(rows):
        try:
            found.append(_entry(dict(columns)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return found, like


def columns_of(entry: FileRow) -> dict[str, Any]:
    """Return the columns from which `read` restores the entry."""
    launch, kind, row = entry
    own = {name: value for name, value in vars(row).items() if value != _DEFAULTS[name]}
    return {"launch": launch, "kind": kind, **own}


def _entry(columns: dict[str, Any]) -> FileRow:
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
    return FileRow(str(launch), str(kind), ConfigRow(**columns))
