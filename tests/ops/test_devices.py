"""Launches happen while the device of their input is the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.ops.execution_mode import call_on_device_of


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_kernels_run_on_the_device_of_their_input(
    monkeypatch: pytest.MonkeyPatch, index: int, entered: list[int]
) -> None:
    seen: list[int] = []
    inside: list[int] = []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        inside.append(chosen.index)
        yield
        inside.clear()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    result = call_on_device_of(x, lambda value: (seen.extend(inside), value)[1], 7)
    assert result == 7
    assert seen == entered
    assert not inside
