"""Whole models in mixed batches on the kernels: launches, plans, wrong ids, and refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.kernels.mixed_models import build, eager, run, step, trainable, use_impl

pytest.importorskip("triton", reason="triton is not installed")

from fastlora import LoraConfig, adapters, get_peft_model
from fastlora.env import triton_interpreted
from fastlora.layers.adapter_factors import ModelAdapterSource
from fastlora.ops import plans
from fastlora.pool import router as batches
from fastlora.routing.active import activate_routing
from fastlora.routing.routing import Routing
from fastlora.testing import assert_within_budget
from fastlora.validation import (
    AdapterNotFoundError,
    ImplementationError,
    UnsupportedLayerError,
)
from tests.support.bytes.byte_counter import ByteCounter

pytestmark = pytest.mark.usefixtures("on_the_labs_device")


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_a_plan_reaches_forward_and_dx(
    monkeypatch: pytest.MonkeyPatch, launches: Any, plan: str
) -> None:
    """Few rows would be fused, many split; what the environment names goes before that."""
    monkeypatch.setattr(plans, "_PLAN", plan)
    model = trainable(2, torch.float32, target_modules=["q"])
    for tokens in (1, 33):
        step(model, torch.randn(3, tokens, 64), ["a1", "a0", None])
        fused, split = launches.of("mixed_linear"), launches.of("mixed_expand")
        assert (fused, split) == (([1, 1], []) if plan == "fused" else ([], [1, 1]))
        launches.clear()


def test_a_batch_of_no_rows(lab: Any) -> None:
    """It gives an empty result and empty gradients, in serving and in training."""
    model, trained = build(lab, 2, torch.float32), trainable(2, torch.float32)
    for shape in ((0, 64), (0, 3, 64)):
        for ids in ([], torch.empty(0, dtype=torch.int64)):
            assert run(model, torch.empty(shape), ids).shape[:-1] == shape[:-1]
            x = torch.empty(shape, requires_grad=True)
            with adapters(trained, ids):
                trained(x).sum().backward()
            assert x.grad is not None and x.grad.shape == shape
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    assert not any(grad.any() for grad in grads)
    with pytest.raises(ValueError, match="0 adapter ids"):
        run(model, torch.zeros(2, 64), [])


def launches_of(model: Any, x: torch.Tensor, ids: Any) -> Counter[str]:
    """Launches of each kernel in one forward, once siblings are known."""
    for _ in range(2):
        run(model, x, ids)
    with ByteCounter(x=[x]) as counter:
        run(model, x, ids)
    return Counter({name: count.launches for name, count in counter.kernels.items()})


@pytest.mark.skipif(not triton_interpreted(), reason="launches are counted in the interpreter")
def test_launches_do_not_depend_on_the_mix(lab: Any) -> None:
    """For q, k and v, and for o, a shrink and a linear, or of many adapters an update.

    For any mix of as many adapters, and for any number that a linear's epilogue takes.
    """
    model = build(lab, 6, torch.float32)
    x = torch.randn(12, 64)
    few = (["a0"] * 12, [None] * 12, [f"a{i % 4}" for i in range(12)])
    many = ([f"a{i % 6}" for i in range(12)], ["a0"] * 7 + [f"a{i}" for i in range(1, 6)])
    for mixes, update in ((few, "linear"), (many, "expand")):
        expected = {"_mixed_lora_shrink_kernel": 2, f"_mixed_lora_{update}_kernel": 2}
        assert all(launches_of(model, x, ids) == expected for ids in mixes)


def test_ids_that_nobody_checked(lab: Any, dtype: torch.dtype) -> None:
    """As on a GPU: NaN where an id is out of range, nobody's gradient from there, and it is said.

    Adapters without rows get zeros, never NaN.
    """
    model, names = trainable(3, dtype), ("a0", "a1", "a2")
    slots = batches.lookup_or_negative_if_out_of_range(
        torch.arange(3), torch.tensor([0, 5, -1, 0, -7])
    )
    slots = slots.to(lab.device)
    assert slots.tolist() == [0, -2, -1, 0, -2]
    tuner, seeds = model.base_model, torch.zeros(3, dtype=torch.int64)

    def routing() -> Routing:
        return Routing(
            tuner.group,
            names,
            slots,
            seeds,
            ModelAdapterSource(names),
            tuner.modules_selecting_adapter_per_row,
        )

    x, good, first = torch.randn(5, 64).to(dtype), [0, 2, 3], routing()
    own = ["a0", None, "a0"]
    expected, exact = run(model, x[good], own), run(eager(model).double(), x[good].double(), own)
    for records in (False, True):
        with activate_routing(first), torch.set_grad_enabled(records):
            y = model.base_model.model(x)
        assert_within_budget(y[good].detach(), expected, exact)
        assert y[[1, 4]].isnan().all()
    y[good].sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".q.lora_" in n}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert bool(gradient.any()) == (".a0." in name), name
    first.defer_id_check()
    with pytest.raises(AdapterNotFoundError, match="out of range.*outputs of its rows are NaN"):
        tuner.group.unchecked.raise_pending_errors()
    tuner.group.unchecked.raise_pending_errors()  # said once
    use_impl(model, "eager")
    with pytest.raises(AdapterNotFoundError, match="out of range"), torch.no_grad():  # noqa: SIM117
        with activate_routing(routing()):
            model(x)


def test_what_kernels_cannot_take_is_said() -> None:
    """A named implementation is never replaced; the automatic one falls back to PyTorch."""
    model = trainable(2, torch.float32)
    layer, x = model.base_model.model.q, torch.randn(2, 64)
    layer.lora_B["a1"].half()
    with (
        adapters(model, ["a0", "a1"]),
        pytest.raises(ImplementationError, match="different dtypes"),
    ):
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
    with adapters(model, ["a0", "a1"]), pytest.raises(UnsupportedLayerError, match="with hooks"):
        layer(x)
    hook.remove()
    model.double()
    with adapters(model, ["a0", "a1"]), pytest.raises(ImplementationError, match="torch.float64"):
        layer(x.double())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["plain", "called"])
def test_a_hooked_factor_is_not_run_in_pytorch_instead(
    lab: Any, use_dora: bool, called: bool
) -> None:
    """A named implementation is never replaced; the automatic one calls the module."""
    kind = type("Called", (nn.Linear,), {}) if called else nn.Linear
    config = LoraConfig(r=2, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(kind(8, 8, device=lab.device)), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, device=lab.device)
    assert model(x).isfinite().all()
    layer.impl = "triton"
    with pytest.raises(ImplementationError, match="'default' has a factor with hooks"):
        model(x)
