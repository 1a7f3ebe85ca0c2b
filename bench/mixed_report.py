"""The results of a comparison of mixed batches as a table, a CSV file, and a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.bench.mixed_contest import BASE, IN_TURN, OURS, PEFT, Row
from fastlora.bench.plot import draw, new_figure

PLOT_HINT = "matplotlib is not installed; pip install matplotlib"
_TITLES = {
    OURS: "fastlora, one batch",
    PEFT: "PEFT adapter_names",
    IN_TURN: "one after another",
}


def table(rows: Sequence[Row]) -> str:
    """Return the times relative to the base model, one line for each number of adapters."""
    by_count: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_count.setdefault(row.adapters, {})[row.side] = row
    lines = [f"{'adapters':>8}{'base model':>13}" + "".join(f"{t:>22}" for t in _TITLES.values())]
    for count, found in by_count.items():
        cells = "".join(f"{found[side].ratio_to_base:>22.2f}" for side in _TITLES)
        lines.append(f"{count:>8}{found[BASE].median_ms:>10,.0f} ms{cells}")
    return "\n".join(lines)


def columns(row: Row) -> dict[str, Any]:
    """Return the CSV columns of a row, with numbers of six digits."""
    named = zip(Row._fields, row, strict=True)
    return {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in named}


def write_csv(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the rows, each preceded by the facts. The file is replaced as a whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*facts, *Row._fields])
            writer.writeheader()
            writer.writerows({**facts, **columns(row)} for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw the time relative to the base model over the number of adapters. Requires matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, ((axis,),) = new_figure(1, 1, (7, 4.2))
    series = {
        label: [(row.adapters, row.ratio_to_base) for row in rows if row.side == side]
        for side, label in _TITLES.items()
    }
    draw(axis, series, ours=(_TITLES[OURS],))
    counts = sorted({row.adapters for row in rows})
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("different adapters in the batch")
    axis.set_ylabel("time / base model")
    axis.set_title(title, fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=110)
