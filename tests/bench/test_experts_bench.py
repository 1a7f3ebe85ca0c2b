"""`bench/experts.py` on tiny experts: rows with all figures, and outputs that are compared."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlora.bench import experts

pytest.importorskip("peft", reason="compares with PEFT")
pytest.importorskip("transformers", minversion="5.0")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight experts of 16 x 8."""
    sizes = {"HIDDEN": 16, "INTERMEDIATE": 8, "EXPERTS": 8, "PER_TOKEN": 2, "RANK": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(experts, name, size)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case has a row of times, ratios, and peaks."""
    out = tmp_path / "out.csv"
    given = ["experts.py", "--tokens", "8", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    assert experts.main() == 0
    rows = list(csv.DictReader(out.open(newline="")))
    cases = [(row["dtype"], row["adapters"], row["tokens"]) for row in rows]
    assert cases == [(dtype, count, "8") for dtype in ("fp32", "bf16") for count in "14"]
    for row in rows:
        assert all(row.values()), row
        figures = {k: float(v) for k, v in row.items() if k.startswith(("step_", "forward_"))}
        assert len(figures) == 2 * 8 and min(figures.values()) > 0


def test_other_outputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed if the sides do not compute the same."""
    twins = experts.twins

    def wrong(*args: Any) -> tuple[Any, Any]:
        ours, theirs = twins(*args)
        factor = experts.factors_of(ours, "adapter0")[1]
        factor.data.copy_(factor.data.flip(1))
        return ours, theirs

    monkeypatch.setattr(experts, "twins", wrong)
    with pytest.raises(RuntimeError, match="outputs of fastlora and PEFT differ"):
        experts.measured("fp32", 1, 8, 1)
