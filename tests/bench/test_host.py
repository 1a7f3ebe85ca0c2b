"""The benchmark of the host's cost: one repeat of every case, and what it counts."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import pytest

from fastlora.bench import host


def test_every_case_is_timed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "host.csv"
    arguments = f"host.py --device cpu --repeats 1 --calls 1 --out {out}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert host.main() == 0
    with out.open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == [case.name for case in host.CASES]
    for row in rows.values():
        bare, ours, peft = (float(row[f"{side}_us"]) for side in ("bare", "fastlora", "peft"))
        assert 0.0 < bare < min(ours, peft)
        assert float(row["ratio_to_peft"]) == pytest.approx((ours - bare) / (peft - bare), rel=0.05)
        assert row["launching"] == "stubbed"
    # A linear of few rows is a launch of its own at least, and no product of PyTorch's.
    evaluation, step = rows["evaluation"], rows["training step"]
    assert 7 <= int(evaluation["launches"]) <= 14
    assert evaluation["products"] == "0"
    assert int(step["launches"]) + int(step["products"]) > 2 * 7


def test_the_cost_is_that_of_the_calls_and_the_least_of_the_repeats() -> None:
    """The first calls of a side, which warm it up, do not count."""
    calls: list[str] = []

    def side(name: str, seconds: float) -> None:
        calls.append(name)
        end = time.process_time() + seconds * (3 if calls.count(name) == 4 else 1)
        while time.process_time() < end:
            pass

    sides = {"a": lambda: side("a", 0.004), "b": lambda: side("b", 0.002)}
    found = host.host_us(sides, 3, 2)
    assert "".join(calls) == "ababab" + "aabb" + "bbaa" + "aabb"
    assert found["a"] == pytest.approx(4000, rel=0.3)
    assert found["b"] == pytest.approx(2000, rel=0.3)
