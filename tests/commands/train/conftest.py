"""What the tests of `fastlora train` share: a tiny model's folder, and a config to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import train_runs


@pytest.fixture(scope="session", autouse=True)
def _libraries() -> None:
    pytest.importorskip("transformers", reason="trains its models")
    pytest.importorskip("accelerate", reason="trains on it")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama's folder, which every test leaves as it was."""
    return train_runs.make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data that no test changes."""
    return train_runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def given(base: Path, tmp_path: Path) -> dict[str, Any]:
    """A config whose data the test may change."""
    data = train_runs.make_data(tmp_path / "data")
    return train_runs.config(base, data, tmp_path / "out", steps=4, save_every=2)


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """See `train_runs.failing`."""
    return train_runs.failing(tmp_path, capsys)
