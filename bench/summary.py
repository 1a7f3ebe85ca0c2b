"""Prints a results CSV as tables: times relative to the bare base linear, and failures.

    python bench/summary.py results.csv

A cell is the geometric mean over the measured shapes of a model. The column `shapes` has their
number. A star marks a cell that lacks some of them.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean

Group = tuple[str, str, str, int, int]  # mode, model, r, adapters of a mixed batch or 0, M


def grouped_ratios(rows: list[dict[str, str]]) -> dict[Group, dict[str, list[float]]]:
    """Return ``ratio_to_base`` of every shape, by group and contender."""
    groups: dict[Group, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ratio_to_base"]:
            adapters = int(row["adapters"] or 0)
            group = (row["mode"], row["model"], row["r"], adapters, int(row["M"]))
            groups[group][row["contender"]].append(float(row["ratio_to_base"]))
    return groups


def _in_order(item: tuple[Group, object]) -> tuple[str, list[int], int, int]:
    """Return a sort key that orders ranks as numbers: 16, 64, then a mix such as 8+16+64."""
    _, model, r, adapters, m = item[0]
    return model, [r.count("+"), *map(int, r.split("+"))], adapters, m


def table(rows: list[dict[str, str]], mode: str) -> list[str]:
    """Return the lines of one mode's table."""
    groups = {group: cells for group, cells in grouped_ratios(rows).items() if group[0] == mode}
    names = list(dict.fromkeys(name for cells in groups.values() for name in cells))
    names = [name for name in names if name != "base"]
    if not names:
        return []
    widths = [max(len(name), 6) + 2 for name in names]
    mixed = mode.startswith("mixed")
    wide = max(4, *(len(group[2]) + 1 for group in groups))
    head = f"{mode:<14}{'r':>{wide}}" + (f"{'adapters':>10}" if mixed else "")
    head += f"{'M':>6}{'shapes':>8}"
    lines = [head + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for (_, model, r, adapters, m), cells in sorted(groups.items(), key=_in_order):
        shapes = max(len(ratios) for ratios in cells.values())
        line = f"{model:<14}{r:>{wide}}" + (f"{adapters:>10}" if mixed else "")
        line += f"{m:>6}{shapes:>8}"
        for name, width in zip(names, widths, strict=True):
            ratios = cells.get(name, [])
            star = "*" if 0 < len(ratios) < shapes else ""
            text = f"{geometric_mean(ratios):.2f}{star}" if ratios else "-"
            line += f"{text:>{width}}"
        lines.append(line)
    return lines


def main() -> int:
    """Print the tables of the file that the command line names."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with Path(sys.argv[1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows:
        first = rows[0]
        print(f"{first['card']}, torch {first['torch']}, triton {first['triton']}, ", end="")
        print(f"commit {first['commit']}, tests {first['tests']}; time over the base linear's:")
    for mode in ("forward", "train", "mixed", "mixed_train"):
        for line in table(rows, mode):
            print(line)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['mode']} {row['model']} {row['layer']} M={row['M']} r={row['r']} ", end="")
            if row["adapters"]:
                print(f"of {row['adapters']} adapters ", end="")
            print(f"{row['contender']}: {row['status']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
