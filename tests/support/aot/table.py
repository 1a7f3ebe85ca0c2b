"""The published table of what every shipped config uses on every chip, read and written."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import triton

from tests.support.aot.resources import Resources

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
