"""`bench/soak.py` for two seconds: the pool behind `fastlora.adapters`, under threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastlora.bench import soak

pytest.importorskip("transformers", reason="the soak's model is a Llama")
OPTIONS = ["--layers", "1", "--minutes", "0.03", "--adapters", "30", "--max-adapters", "12"]
OPTIONS += ["--device-mib", "1", "--cpu-mib", "0", "--check", "1"]


def test_a_short_soak_finds_no_wrong_row(capfd: pytest.CaptureFixture[str]) -> None:
    assert soak.main(OPTIONS) == 0
    out = capfd.readouterr().out
    assert "no wrong row" in out and "adapters 30, used 30" in out


def test_a_soak_notices_a_wrong_adapter(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = soak.load_file

    def load(path: Path) -> dict[str, torch.Tensor]:
        tensors = real(path)
        next(iter(tensors.values()))[0, 0] += 1
        return tensors

    monkeypatch.setattr(soak, "load_file", load)  # what the solo runs read
    monkeypatch.setattr(soak, "ORDERS", 2)  # one layer carries no rounding far
    assert soak.main(OPTIONS) == 1
    assert "WRONG: row" in capfd.readouterr().out
