"""The table of mutants: few survive, and each of those for a reason."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.faults.fault import ROOT


def test_few_mutants_survive_and_each_for_a_reason() -> None:
    with Path(__file__).with_name("mutants.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300
    assert {row["outcome"] for row in rows} == {"killed", "survived", "time limit"}
    survivors = [row for row in rows if row["outcome"] == "survived"]
    assert len(survivors) <= 0.1 * len(rows)
    assert [row["line"] for row in rows if bool(row["reason"]) != (row in survivors)] == []
    assert all((ROOT / row["module"]).exists() for row in rows)
