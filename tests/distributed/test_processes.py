"""Two real processes on gloo: DDP, FSDP2, tensor parallelism, mixed batches (checks_*.py)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from processes import checks_of, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
pytest.importorskip("transformers", reason="the checks train a tiny Llama")

FILES = (
    *("checks_data_parallel", "checks_fsdp2", "checks_mixed", "checks_tensor_parallel"),
    "checks_docs",
)
CHECKS = [(name, check) for name in FILES for check in checks_of(importlib.import_module(name))]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How the checks of each file ended, as far as they have run."""
    return {}


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_in_two_processes(
    name: str,
    check: str,
    outcomes: dict[str, dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The first check of a file runs all of them."""
    if name not in outcomes:
        outcomes[name] = run(name, tmp_path_factory.mktemp(name))
    found = outcomes[name].get(check, "did not run: a check before it failed")
    assert not found, found
