"""Draws a results CSV: time over the bare base linear against rows, one panel a layer.

python bench/plot.py results.csv [picture.png]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = ("peft", "peft_fp32", "addmm", "fused", "split")
COLUMNS = 3


def main() -> int:
    """Writes the picture beside the CSV, or where the command line says."""
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    with source.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio_to_base"]]
    if not rows:
        print(f"{source} has no timed rows", file=sys.stderr)
        return 1
    panels: dict[tuple[str, ...], dict[str, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["contender"] in SHOWN:
            key = (row["mode"], row["model"], row["layer"], row["K"], row["N"], row["r"])
            point = (int(row["M"]), float(row["ratio_to_base"]))
            panels[key][row["contender"]].append(point)

    lines = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(5 * COLUMNS, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, series) in zip(axes.flat, sorted(panels.items()), strict=False):
        mode, model, layer, k, n, r = key
        for name in SHOWN:
            if points := sorted(series.get(name, [])):
                ours = name in ("fused", "split")
                axis.plot(*zip(*points, strict=True), "o-" if ours else "s--", label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{model} {layer} {k}->{n}, r={r}, {mode}", fontsize=9)
        axis.set_xlabel("rows (M)")
        axis.set_ylabel("time / base linear")
    axes.flat[0].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"{first['card']}, {first['dtype']}, torch {first['torch']}, triton {first['triton']}, "
        f"commit {first['commit']}, tests {first['tests']}"
    )
    figure.savefig(target, dpi=110)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
