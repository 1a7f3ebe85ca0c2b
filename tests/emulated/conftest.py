"""Starts the emulator where nothing but these tests is asked for.

It replaces Triton's driver for the whole process, so beside other tests these skip.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.build import unavailable_reason

FOLDER = Path(__file__).parent
PLUGIN = "tests.emulator.plugin"


def pytest_configure(config: pytest.Config) -> None:
    """Starts the emulator of the chip that ``$EMULATE`` names; without a compiler it fails."""
    os.environ.setdefault("EMULATE", "sm_80")
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    if all(path.resolve().is_relative_to(FOLDER) for path in asked) and not _skip_reason():
        config.pluginmanager.import_plugin(PLUGIN)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where the emulator did not start."""
    if config.pluginmanager.has_plugin(PLUGIN):
        return
    reason = _skip_reason() or "beside other tests; run python -m pytest tests/emulated"
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.skip(reason=reason))


def _skip_reason() -> str:
    """Returns why the emulator cannot run here; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return unavailable_reason()


@pytest.fixture
def emulation(pytestconfig: pytest.Config) -> Any:
    """The `Emulation` of this process."""
    plugin: Any = pytestconfig.pluginmanager.get_plugin(PLUGIN)
    return plugin.emulation
