"""Writes the tables of docs/speed.md from the CSVs in bench/results.

python bench/speed_page.py            writes them
python bench/speed_page.py --check    returns 1 if the page's tables differ from the CSVs

A line ``<!-- KIND FILE.csv -->`` of the page is followed by that table, up to the next empty line.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "bench" / "results"
_PLACE = re.compile(r"^<!-- (\w+) (\S+\.csv) -->\n(?:\|.*\n)*", re.M)

Row = dict[str, str]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def steps(rows: Sequence[Row]) -> str:
    """A training step over PEFT's, its forward, its peak memory; the last row of a case counts."""
    lines = {}
    for row in rows:
        dropout = float(row["dropout"])
        method = {"lora": "LoRA", "dora": "DoRA"}[row["method"]]
        method += f", dropout {dropout:g}" if dropout else ""
        adapters = "" if row["dtype"] == "fp32" else f", {row['adapters']} adapters"
        forward = row.get("forward_ratio_to_peft")
        lines[row["batch"], method, row["dtype"] + adapters] = (
            f"{float(row['ratio_to_peft']):.2f}",
            f"{float(forward):.2f}" if forward else "",
            f"{float(row['peak_ratio']):.2f}",
            row["rounds"],
            row["commit"][:8],
        )
    head = ("tokens", "adapter", "dtype", "step", "forward", "peak memory", "rounds", "commit")
    return _table(head, ((*case, *figures) for case, figures in lines.items()))


def mixed(rows: Sequence[Row]) -> str:
    """Time over the base model's: fastlora in one block, in brackets PEFT's ``adapter_names``."""
    ratios = {
        (row["phase"], row["dtype"], row["adapters"], row["side"]): row["ratio_to_base"]
        for row in rows
    }
    counts = sorted({row["adapters"] for row in rows}, key=int)
    lines = []
    for phase, dtype in _unique((row["phase"], row["dtype"]) for row in rows):
        cells = []
        for count in counts:
            ours = ratios.get((phase, dtype, count, "fastlora_one_block"))
            peft = ratios.get((phase, dtype, count, "peft"))
            cells.append(f"{float(ours):.2f} ({float(peft):.2f})" if ours and peft else "")
        lines.append((f"{phase}, {dtype}", *cells))
    return _table(("adapters in the batch", *counts), lines)


def host(rows: Sequence[Row]) -> str:
    """What the host does for a linear over the bare layer, in microseconds."""
    lines = (
        (
            row["case"],
            row["adapters"],
            f"{float(row['fastlora_over_bare_us']):.1f}",
            f"{float(row['peft_over_bare_us']):.1f}",
            f"{float(row['ratio_to_peft']):.2f}",
        )
        for row in rows
    )
    return _table(("case", "adapters", "fastlora, us", "PEFT, us", "ratio"), lines)


def prediction(rows: Sequence[Row]) -> str:
    """Predicted time of a decoder layer's linears over the bare layer's."""
    shown = [row for row in rows if row["model"] == "Llama-3.1-8B"]
    bare = {
        (row["case"], row["M"], row["adapters"], row["dropout"]): float(row["predicted_us"])
        for row in shown
        if row["contender"] == "base"
    }
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in shown:
        key = (row["case"], row["M"], row["adapters"], row["dropout"])
        ratio = float(row["predicted_us"]) / bare[key]
        lines.setdefault(key, {})[row["contender"]] = f"{ratio:.2f}"
    names = ("fastlora", "peft", "addmm")
    head = ("case", "tokens", "adapters", "dropout", *names)
    return _table(head, ((*key, *(of.get(n, "") for n in names)) for key, of in lines.items()))


_KINDS: dict[str, Callable[[Sequence[Row]], str]] = {
    "steps": steps,
    "mixed": mixed,
    "host": host,
    "prediction": prediction,
}


def rendered(page: str) -> str:
    """Returns the page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        kind, name = match.groups()
        with (RESULTS / name).open(newline="", encoding="utf-8") as file:
            return f"<!-- {kind} {name} -->\n{_KINDS[kind](list(csv.DictReader(file)))}"

    return _PLACE.sub(made, page)


def main() -> int:
    """Writes the page, or says whether it is as it should be."""
    page = PAGE.read_text(encoding="utf-8")
    made = rendered(page)
    if sys.argv[1:] == ["--check"]:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
