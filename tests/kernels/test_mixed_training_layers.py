"""Whole models in mixed batches with gradients on the kernels: the eager results, solo and joint.

Gradients under dropout are held to float64 with the mask that the kernels' integers give.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.kernels.mixed_models import (
    compare,
    eager,
    step,
    trainable,
)

pytest.importorskip("triton", reason="triton is not installed")

from fastlora import adapters
from fastlora.layers.factors import Parameters
from fastlora.pool import router as batches
from fastlora.routing.in_force import routed
from fastlora.routing.routing import Routing
from fastlora.validation import (
    AdapterNotFoundError,
    ImplementationError,
    UnsupportedLayerError,
)


@pytest.fixture(autouse=True)
def on_the_labs_device(lab: Any) -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with torch.device(lab.device):
        yield


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_a_plan_reaches_forward_and_dx(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Few rows would be fused, many split; what the environment names goes before that."""
    from fastlora.kernels import mixed_lora_expand, mixed_lora_linear
    from fastlora.ops import plans

    seen: list[str] = []

    def note(module: Any, name: str, what: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> None:
            seen.append(what)
            plain(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    note(mixed_lora_linear, "launch_mixed_lora_linear", "fused")
    note(mixed_lora_expand, "launch_mixed_lora_expand", "split")
    monkeypatch.setattr(plans, "_PLAN", plan)
    model = trainable(2, torch.float32, target_modules=["q"])
    for tokens in (1, 33):
        step(model, torch.randn(3, tokens, 64), ["a1", "a0", None])
        assert seen == [plan, plan]
        seen.clear()


@pytest.mark.usefixtures("kernel_masks")
def test_dropout_is_the_mask_of_the_adapters_own_rows() -> None:
    """The function of (adapter's seed, layer, row among the adapter's rows, column), exactly."""
    model = trainable(4, torch.float32, lora_dropout=0.25, target_modules=["q", "o"]).train()
    x = torch.randn(6, 3, 64)
    names = ["a1", None, "a0", "a3", "a2", "a1"]
    seeds = {f"a{i}": 1000 + i for i in range(4)}
    found = step(model, x, names, seeds)
    again = step(model, x, names, seeds)
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    other = step(model, x, names, {**seeds, "a1": 5})["y"]
    rows = [i for i, name in enumerate(names) if name != "a1"]
    assert torch.equal(other[rows], found["y"][rows])
    assert not torch.allclose(other[0], found["y"][0])
    with torch.no_grad(), adapters(model, names, seeds=seeds):
        assert torch.equal(model(x), found["y"])
    slow = eager(model)
    compare(found, step(slow, x, names, seeds), step(slow.double(), x.double(), names, seeds))


def test_ids_that_nobody_checked() -> None:
    """As on a GPU: NaN where an id is out of range, nobody's gradient from there, and it is said.

    Adapters without rows get zeros, never NaN.
    """
    model = trainable(3, torch.float32)
    slots = batches.looked_up(torch.arange(3), torch.tensor([0, 5, -1, 0, -7]))
    tuner, names = model.base_model, ("a0", "a1", "a2")
    seeds = torch.zeros(3, dtype=torch.int64)
    routing = Routing(tuner.group, names, slots, seeds, Parameters(names), tuner.routed)
    x = torch.randn(5, 64)
    with routed(routing):
        y = model.base_model.model.q(x)
    assert y[[1, 4]].isnan().all()
    y[[0, 2, 3]].sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".q.lora_" in n}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert bool(gradient.any()) == (".a0." in name), name
    with pytest.raises(AdapterNotFoundError, match="out of range.*came out NaN"):
        routing.check_ids()


def test_what_kernels_cannot_take_is_said() -> None:
    """A named implementation is never replaced; the automatic one falls back to PyTorch."""
    model = trainable(2, torch.float32)
    layer, x = model.base_model.model.q, torch.randn(2, 64)
    layer.lora_B["a1"].half()
    with adapters(model, ["a0", "a1"]), pytest.raises(ImplementationError, match="than one dtype"):
        layer(x)
    layer.impl = "eager"
    with adapters(model, ["a0", "a1"]):
        assert layer(x).isfinite().all()
    layer.impl = "triton"
    layer.lora_B["a1"].double()
    layer.lora_A["a1"].double()
    with (
        adapters(model, ["a1", "a1"]),
        pytest.raises(ImplementationError, match="of torch.float64"),
    ):
        layer(x)
    model.float()
    hook = layer.lora_A["a0"].register_forward_hook(lambda *_: None)
    with adapters(model, ["a0", "a1"]), pytest.raises(UnsupportedLayerError, match="is hooked"):
        layer(x)
    hook.remove()
    model.double()
    with adapters(model, ["a0", "a1"]), pytest.raises(ImplementationError, match="torch.float64"):
        layer(x.double())
