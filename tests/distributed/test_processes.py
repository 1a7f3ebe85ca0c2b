"""Two real processes on gloo: DDP, FSDP2, tensor parallelism, mixed batches (checks_*.py)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from tests.support.distributed.processes import checks_of, module_of, outcome_of, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
pytest.importorskip("transformers", reason="the checks train a tiny Llama")

FILES = ("checks_fsdp2", "checks_mixed", "checks_experts", "checks_tensor_parallel", "checks_docs")
CHECKS = [(name, check) for name in FILES for check in checks_of(module_of(name))]


class Run(NamedTuple):
    """Where the checks wrote, and what they printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every file of which a check is asked for has run."""
    asked = {
        item.callspec.params.get("name")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    folder = tmp_path_factory.mktemp("checks")
    return Run(folder, run([name for name in FILES if name in asked], folder))


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_in_two_processes(name: str, check: str, ran: Run) -> None:
    """The first check runs all of them."""
    found = outcome_of(name, *ran).get(check, "did not run: a check before it failed")
    assert not found, found
