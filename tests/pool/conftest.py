"""Adapters for the tests of a pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pool_adapters import make_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight adapters of rank 2, `a0` to `a7`."""
    for seed in range(8):
        make_folder(tmp_path / "adapters" / f"a{seed}", seed)
    return tmp_path / "adapters"
