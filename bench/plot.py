"""Draws a results CSV: time over the bare base linear against rows, one panel per layer.

python bench/plot.py results.csv [picture.png]
python bench/plot.py mixed_cpu.csv [picture.png]     decode over the base model against adapters
python bench/plot.py engine_cpu.csv [picture.png]    time in vLLM with its own LoRA and fastlora's
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SHOWN = ("peft", "peft_fp32", "addmm", "fused", "split")
COLUMNS = 3

Points = Sequence[tuple[int, float]]


def new_figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes ``[lines, columns]``; raise `ImportError` without matplotlib."""
    # Only Figure is used: pyplot would need a display and keep the figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def draw(axis: Any, series: Mapping[str, Points], ours: Collection[str]) -> None:
    """Draw a curve of ratios for each name, fastlora's solid, and a line at the base's time."""
    for name, points in series.items():
        axis.plot(*zip(*points, strict=True), "o-" if name in ours else "s--", label=name)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)


def main() -> int:
    """Write the picture next to the CSV, or to the path on the command line."""
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    if not picture(source, target, SHOWN):
        print(f"{source} has no timed rows", file=sys.stderr)
        return 1
    print(target)
    return 0


def mixed_picture(rows: Sequence[Mapping[str, str]], target: Path) -> bool:
    """Draw the decodes in a CSV of ``bench/mixed.py``: fastlora and PEFT, one panel per dtype."""
    sides = {"fastlora": "fastlora_one_block", "PEFT, adapter_names": "peft"}
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    figure, axes = new_figure(1, len(dtypes), (4.6 * len(dtypes), 3.4))
    for axis, dtype in zip(axes.flat, dtypes, strict=True):
        series = {
            label: sorted(
                (int(row["adapters"]), float(row["ratio_to_base"]))
                for row in rows
                if (row["phase"], row["dtype"], row["side"]) == ("decode", dtype, side)
            )
            for label, side in sides.items()
        }
        draw(axis, series, ours=("fastlora",))
        counts = [count for count, _ in series["fastlora"]]
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"decode, 64 sequences, {dtype}", fontsize=9)
        axis.set_xlabel("different adapters in the batch")
        axis.set_ylabel("time / base model")
    axes.flat[0].legend(fontsize=8)
    figure.savefig(target, dpi=110)
    return True


def engine_picture(rows: Sequence[Mapping[str, str]], target: Path) -> bool:
    """Draw the ratios in a CSV of ``bench/engine.py``: vLLM's own LoRA over fastlora's."""
    groups = [name for name in ("rank-64", "rank-8") if any(row["group"] == name for row in rows)]
    if not groups:
        return False
    figure, axes = new_figure(1, len(groups), (5.2 * len(groups), 3.4))
    for axis, group in zip(axes.flat, groups, strict=True):
        times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["group"] == group:
                times[row["case"]][row["backend"]].append(float(row["median_ms"]))
        cases = [case for case, found in times.items() if {"stock", "fastlora"} <= found.keys()]
        ratios = [median(times[case]["stock"]) / median(times[case]["fastlora"]) for case in cases]
        bars = axis.barh(cases, ratios)
        labels = axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.axvline(1.0, color="black", linewidth=0.8, zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xlim(0.5, 2 * max(ratios))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.invert_yaxis()
        axis.set_title(f"max_lora_rank {group.partition('-')[2]}", fontsize=9)
        axis.set_xlabel("time with vLLM's LoRA / time with fastlora's")
    figure.savefig(target, dpi=110)
    return True


def picture(source: Path, target: Path, shown: Sequence[str]) -> bool:
    """Draw the rows of some contenders; return whether any of them was timed."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "backend" in rows[0]:
        return engine_picture(rows, target)
    rows = [row for row in rows if row["ratio_to_base"]]
    if not rows:
        return False
    if "side" in rows[0]:
        return mixed_picture(rows, target)
    panels: dict[tuple[str, ...], dict[str, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["contender"] in shown:
            key = (row["mode"], row["model"], row["layer"], row["K"], row["N"], row["r"])
            point = (int(row["M"]), float(row["ratio_to_base"]))
            panels[key][row["contender"]].append(point)

    lines = -(-len(panels) // COLUMNS)
    figure, axes = new_figure(lines, COLUMNS, (5 * COLUMNS, 3.4 * lines))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, found) in zip(axes.flat, sorted(panels.items()), strict=False):
        mode, model, layer, k, n, r = key
        series = {name: sorted(found[name]) for name in shown if name in found}
        draw(axis, series, ours=("fused", "split"))
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
    return True


if __name__ == "__main__":
    sys.exit(main())
