"""Writes the tables of docs/speed.md from the CSVs in bench/results.

python bench/speed_page.py            writes them
python bench/speed_page.py --check    returns 1 if the page's tables differ from the CSVs

In the page, each line ``<!-- KIND FILE.csv -->`` is followed by its table, up to the next empty
line.
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
    """Return the table of training steps relative to PEFT: step, forward pass, and peak memory.

    If a case has several rows, the last one counts.
    """
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
    """Return times relative to the base model: fastlora in one block, and in brackets PEFT."""
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


def experts(rows: Sequence[Row]) -> str:
    """Return fastlora's times relative to PEFT's and the base module's, and its peak memory."""
    lines = []
    for row in rows:
        ratios = [
            float(row[f"{kind}_ratio_to_{other}"])
            for kind in ("step", "forward")
            for other in ("peft", "base")
        ]
        peak = float(row["step_fastlora_peak_mib"]) / float(row["step_peft_peak_mib"])
        figures = (f"{value:.2f}" for value in (*ratios, peak))
        lines.append(
            (row["dtype"], row["adapters"], row["tokens"], *figures, row["rounds"])
            + (row["commit"][:8],)
        )
    times = ("step / PEFT", "step / base", "forward / PEFT", "forward / base")
    head = ("dtype", "adapters", "tokens", *times, "peak memory / PEFT", "rounds", "commit")
    return _table(head, lines)


def host(rows: Sequence[Row]) -> str:
    """Return the host time of a linear layer beyond the bare layer's, in microseconds."""
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
    """Return the predicted times of a decoder layer's linears, relative to the bare layer."""
    shown = [row for row in rows if row["model"] == "Llama-3.1-8B"]
    columns = ("case", "M", "adapters", "r", "dropout")
    bare = {
        tuple(row[column] for column in columns): float(row["predicted_us"])
        for row in shown
        if row["contender"] == "base"
    }
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in shown:
        key = tuple(row[column] for column in columns)
        ratio = float(row["predicted_us"]) / bare[key]
        lines.setdefault(key, {})[row["contender"]] = f"{ratio:.2f}"
    names = ("fastlora before", "fastlora", "peft", "addmm")
    head = ("case", "tokens", "adapters", "rank", "dropout", *names)
    return _table(head, ((*key, *(of.get(n, "") for n in names)) for key, of in lines.items()))


_KINDS: dict[str, Callable[[Sequence[Row]], str]] = {
    "steps": steps,
    "mixed": mixed,
    "experts": experts,
    "host": host,
    "prediction": prediction,
}


def rendered(page: str) -> str:
    """Return the page with its tables rebuilt from the CSVs."""

    def made(match: re.Match[str]) -> str:
        kind, name = match.groups()
        with (RESULTS / name).open(newline="", encoding="utf-8") as file:
            return f"<!-- {kind} {name} -->\n{_KINDS[kind](list(csv.DictReader(file)))}"

    return _PLACE.sub(made, page)


def main() -> int:
    """Write the page, or check whether its tables are up to date."""
    page = PAGE.read_text(encoding="utf-8")
    made = rendered(page)
    if sys.argv[1:] == ["--check"]:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
