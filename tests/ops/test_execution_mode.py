"""How a layer's forward pass is run."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import ModuleType

import pytest
import torch

import fastlora
from fastlora import sharding
from fastlora.ops.execution_mode import batch_invariant, is_batch_invariant
from fastlora.validation import ImplementationError
from tests.support.tiny import TwoLayers


def test_a_graph_compiled_before_the_first_use_of_the_mode() -> None:
    """It is compiled again in the mode, in every thread."""
    compiled = torch.compile(lambda x: x + is_batch_invariant(), backend="eager", fullgraph=True)
    found: list[float] = []

    def run() -> None:
        for enabled in (False, True, False):
            with batch_invariant() if enabled else contextlib.nullcontext():
                found.append(compiled(torch.zeros(())).item())

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == [0, 1, 0] * 2


@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_batch_in_the_mode_without_kernels(training: bool) -> None:
    """The error names the device before anything that `eval()` would change."""
    config = fastlora.LoraConfig(r=2, target_modules=["q"])
    model = fastlora.get_peft_model(TwoLayers(), config).train(training)
    with (
        batch_invariant(),
        fastlora.adapters(model, ["default", None]),
        pytest.raises(ImplementationError, match="no Triton kernels for device type 'cpu'"),
    ):
        model(torch.randn(2, 16))


@pytest.mark.parametrize("name", ["torch.distributed.tensor", "torch.distributed.fsdp"])
def test_a_module_that_another_thread_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in `sys.modules` before it has its classes."""
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert not sharding.is_dtensor(torch.zeros(1))
    assert not sharding.fully_shard_was_called()
