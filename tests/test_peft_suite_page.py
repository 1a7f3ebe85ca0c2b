"""The page about PEFT's own tests: what it counts, and that every row has a reason."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.peft_suite import RULES, main, read


def test_page(tmp_path: Path) -> None:
    """Failures are sorted by the first rule that they match; what base fails does not count."""
    why = {"type": "ConfigError", "message": "fastlora does not support use_bdlora=['x']"}
    odd = {"type": "KeyError", "message": "'never seen'"}
    runs = {
        "base": [("t.py::a", "passed"), ("t.py::b", "passed"), ("t.py::c", "failed")],
        "ours": [("t.py::a", "failed", why), ("t.py::b", "failed", odd), ("t.py::c", "failed")],
        "patched": [("t.py::a", "passed"), ("t.py::b", "failed", odd)],
    }
    for name, rows in runs.items():
        entries = [{"id": i, "outcome": o, "why": (w or [None])[0]} for i, o, *w in rows]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(read(str(tmp_path / "ours"))) == 3
    page = main(*(str(tmp_path / name) for name in runs)).splitlines()
    assert f"| {RULES[0].label} | 1 | {RULES[0].reason} |" in page
    assert "| Not sorted | 1 | to be read |" in page
    assert "b" in page and "a" not in page


def test_page_in_the_docs() -> None:
    """Every row of it is of a rule that there is, and nothing is left unsorted."""
    page = (Path(__file__).parents[1] / "docs/peft_suite.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    known = {f"{rule.label} | {rule.reason}" for rule in RULES}
    table = [
        row.strip("| ").split(" | ")
        for row in rows
        if "differences.md" in row or "not supported by fastlora" in row
    ]
    assert table and {f"{label} | {reason}" for label, _, reason in table} <= known
    assert "Not sorted" not in page and "PEFT 0.21.2" in page
