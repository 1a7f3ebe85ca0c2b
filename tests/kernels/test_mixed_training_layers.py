"""Whole models in mixed batches with gradients on the kernels: the eager results, solo and joint.

Gradients under dropout are held to float64 with the mask that the kernels' integers give.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.kernels.mixed_models import (
    NAMES,
    Scaled,
    compare,
    eager,
    step,
    trainable,
)

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora import adapters
from fastlora.layers.factors import Parameters
from fastlora.model.inject import lora_layers
from fastlora.pool import router as batches
from fastlora.routing.in_force import routed
from fastlora.routing.routing import Routing
from fastlora.train import train_adapters
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


def test_gradients_are_the_eager_ones(dtype: torch.dtype) -> None:
    """Mixed ranks, rsLoRA, lora_bias, absent modules and base rows; fused and split plans."""
    model = trainable(5, dtype)
    # A plan for few rows in one dtype, the other one's in the other.
    x = torch.randn(9, 9 if dtype == torch.float32 else 1, 64).to(dtype)
    reference_model = eager(model)
    near = step(reference_model, x, NAMES)
    exact = step(reference_model.double(), x.double(), NAMES)
    compare(step(model, x, NAMES), near, exact)


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


def test_autocast() -> None:
    """fp32 masters under autocast: products in half, gradients in fp32, as in PyTorch's path."""
    model = trainable(3, torch.float32, target_modules=["q", "o"])
    x, names = torch.randn(6, 3, 64), ["a1", None, "a0", "a2", "a1", "a0"]

    def run(some: Any) -> dict[str, torch.Tensor]:
        with torch.autocast(x.device.type, torch.float16):
            return step(some, x, names)

    found, near = run(model), run(eager(model))
    exact = step(eager(model).double(), x.double(), names)
    assert found["y"].dtype == torch.float16
    assert all(t.dtype == torch.float32 for name, t in found.items() if name != "y")
    # The budget of half, whatever dtype a gradient is handed out in.
    compare({k: t.half() for k, t in found.items()}, {k: t.half() for k, t in near.items()}, exact)


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


def test_joint_training_is_solo_training() -> None:
    """Steps of three adapters with dropout and uneven rows end where each does alone."""
    generator = torch.Generator().manual_seed(0)
    mixes = [["a0", "a2", "a1", "a0", "a2"], ["a2", "a0", "a0", "a0"], ["a1", "a2", "a2", "a1"]]
    steps = [(names, torch.randn(len(names), 3, 64, generator=generator)) for names in mixes]

    def train(only: str | None) -> dict[str, torch.Tensor]:
        model = trainable(3, torch.float32, lora_dropout=0.2, target_modules=["q"]).train()
        for index, (names, x) in enumerate(steps):
            keep = [i for i, name in enumerate(names) if only in (None, name)]
            if keep:
                present = [names[i] for i in keep]
                seeds = {name: 100 * index + ord(name[1]) for name in set(present)}
                found = step(model, x[keep], present, seeds)
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if name in found:
                            parameter -= 1e-3 * found[name]
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    joint = train(None)
    for name in ("a0", "a1", "a2"):
        solo = train(name)
        for key in (key for key in joint if f".{name}." in key):
            torch.testing.assert_close(joint[key], solo[key], msg=key)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_outside_the_block_and_in_another_thread(use_reentrant: bool) -> None:
    """A recomputed forward drops what the first did, bit for bit."""
    model = trainable(3, torch.float32, lora_dropout=0.3, target_modules=["q"]).train()
    x = torch.randn(4, 2, 64)

    def run(kind: str) -> list[torch.Tensor]:
        torch.manual_seed(2)
        outputs = []
        for names in (["a1", None, "a0", "a2"], ["a2", "a1", "a1", "a0"]):
            with adapters(model, names):
                if kind == "plain":
                    outputs.append(model(x))
                else:
                    leaf = x.clone().requires_grad_()
                    outputs.append(checkpoint(model, leaf, use_reentrant=use_reentrant))
        thread = threading.Thread(target=sum(y.pow(2).sum() for y in outputs).backward)
        thread.start()
        thread.join()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    for plain, recomputed in zip(run("plain"), run("checkpoint"), strict=True):
        assert torch.equal(plain, recomputed)


def test_saved_tensors() -> None:
    """x, s, seeds, scalings and parameters; nothing of the size of y or of another copy of x."""
    model = trainable(3, torch.float32, lora_dropout=0.1).train()
    layer = model.base_model.model.q
    x = torch.randn(40, 64, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with (
        adapters(model, ["a0", "a1", "a2", None] * 10),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        layer(x)
    known = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert sorted(tuple(tensor.shape) for tensor in others) == [(3,), (3,), (40, 64)]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1


def test_frozen_adapters_get_no_gradient() -> None:
    """Of one factor, of one adapter, of x alone: what is asked for is right, the rest is None."""
    model = trainable(3, torch.float32, target_modules=["q"])
    x, names = torch.randn(5, 2, 64), ["a1", "a0", None, "a2", "a0"]
    whole = step(model, x, names)
    for frozen in ("lora_A", "lora_B", ".a0.", "lora_"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
        found = step(model, x, names)
        assert set(found) == {name for name in whole if frozen not in name}
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def test_base_weight_and_bias_may_train(dtype: torch.dtype) -> None:
    model = trainable(2, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith(("q.weight", "q.bias")))
    x, names = torch.randn(4, 2, 64).to(dtype), ["a1", "a0", None, "a1"]
    slow = eager(model)
    near, exact = step(slow, x, names), step(slow.double(), x.double(), names)
    found = step(model, x, names)
    assert any(name.endswith("q.weight") for name in found)
    compare(found, near, exact)


def test_beside_a_base_layer_called_as_it_is(dtype: torch.dtype) -> None:
    """The layer's own output plus every row's adapter, with gradients through both."""
    torch.manual_seed(0)
    base = nn.Sequential(Scaled(64, 48)).to(dtype)
    config = {"target_modules": ["0"], "init_lora_weights": False}
    model = fastlora.get_peft_model(
        base, fastlora.LoraConfig(r=8, **config), "a0", autocast_adapter_dtype=False
    )
    model.add_adapter("a1", fastlora.LoraConfig(r=3, lora_bias=True, **config))
    model = model.to(dtype).eval()
    train_adapters(model, ["a0", "a1"])
    (layer,) = lora_layers(model)
    layer.impl = "triton"
    x, names = torch.randn(5, 7, 64).to(dtype), ["a1", "a0", None, "a1", "a0"]
    slow = eager(model)
    near, exact = step(slow, x, names), step(slow.double(), x.double(), names)
    compare(step(model, x, names), near, exact)


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


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
def test_adapters_without_rows_get_zeros_where_processes_share_a_batch(called: bool) -> None:
    """All of their parameters, magnitudes too: DDP waits for each, also without rows of it."""
    torch.manual_seed(0)
    base = nn.Sequential(Scaled(16, 8) if called else nn.Linear(16, 8))
    model = fastlora.get_peft_model(base, fastlora.LoraConfig(r=2, target_modules=["0"]), "a")
    for name, p in (("b", 0.0), ("c", 0.5)):
        config = fastlora.LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=p)
        model.add_adapter(name, config)
    train_adapters(model, ["a", "b", "c"])
    (layer,) = lora_layers(model)
    layer.impl = "triton"
    x = torch.randn(4, 16)
    for ids in (["a", "a", None, "a"], ["c"] * 4, ["b"] * 4, [None] * 4):
        with adapters(model, ids, absent_gradients=True):
            y = model(x)
        y.pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (ids, name)
                has_rows = any(f".{own}." in name for own in ids if own)
                assert has_rows or not parameter.grad.any(), (ids, name)
                parameter.grad = None


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
