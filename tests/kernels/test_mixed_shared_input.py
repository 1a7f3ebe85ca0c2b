"""A group in mixed batches with gradients: one launch for every s, and one for every d_lora_a."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora import adapters, fusion_report
from fastlora.env import triton_interpreted
from fastlora.model.inject import lora_layers
from fastlora.ops import philox_reference
from fastlora.ops.torch import reference
from fastlora.testing import assert_within_budget
from fastlora.train import train_adapters
from tests.support.bytes.byte_counter import ByteCounter
from tests.support.kernels.mixed_models import (
    compare,
    eager,
    step,
    trainable,
)
from tests.support.sums import yardstick


@pytest.fixture(autouse=True)
def on_the_labs_device(lab: Any) -> Iterator[None]:
    """Tensors are made where the kernels run, of NaN until somebody writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(lab.device):
        yield
    torch.use_deterministic_algorithms(False)


def kernel_keep(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The kernels' mask in PyTorch's place."""
    keep = philox_reference.philox_keep_mask(int(seed), *x.shape, p)
    return keep.to(x.device, reference.INTEGERS[x.itemsize])


def notes(model: Any) -> list[str]:
    """What the fusion report says of q, k, v and o."""
    return [row.shared_input for row in fusion_report(model).rows]


@pytest.mark.skipif(not triton_interpreted(), reason="bytes are counted in the interpreter")
def test_x_is_read_once_forward_and_once_backward() -> None:
    """Where the siblings' ranks fit one block together: a third of what q, k and v read apart."""
    model = trainable(2, torch.float16, r=16, target_modules=["q", "k", "v"])
    x, names = torch.randn(64, 64).half(), ["a0", "a1"] * 32
    issued = []
    for _ in range(2):
        with ByteCounter(x=[x]) as counter:
            step(model, x, names)
        stems = ("_mixed_lora_shrink_kernel", "_mixed_lora_grad_a_kernel")
        read = [counter.kernels[stem].loads["x"] for stem in stems]
        assert [traffic.issued for traffic in read] == [traffic.distinct for traffic in read]
        issued.append([traffic.issued for traffic in read])
    apart, shared = issued
    assert shared == [x.nbytes] * 2
    assert apart == [3 * x.nbytes] * 2


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_backward_of_some_grouped_layers_and_in_another_thread(launches: Any) -> None:
    """Who takes no part gets no gradient, as apart; anomaly detection finds nothing unwritten."""
    model = trainable(3, torch.float32)
    layers = model.base_model.model
    x, names = torch.randn(5, 64), ["a1", "a0", None, "a2", "a0"]

    def run() -> dict[str, torch.Tensor]:
        with adapters(model, names):
            q, k, _ = layers.q(x), layers.k(x), layers.v(x)
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = q.pow(2).sum() + k.pow(2).sum()
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    apart = run()
    layers.q(x.clone())
    launches.clear()
    shared = run()
    assert launches.of("mixed_shrink") == [3]
    exact = step_of_two(eager(model).double(), x.double(), names)
    assert set(shared) == set(apart) == set(exact)
    for name, gradient in shared.items():
        assert_within_budget(gradient, apart[name], exact[name], name)


def step_of_two(model: Any, x: torch.Tensor, names: Any) -> dict[str, torch.Tensor]:
    """The gradients of parameters where v takes no part."""
    layers = model.base_model.model
    with adapters(model, names):
        (layers.q(x).pow(2).sum() + layers.k(x).pow(2).sum()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_what_is_not_shared(launches: Any) -> None:
    """A written x, another batch, a written factor, dropout, hooks: each layer as if alone."""
    model = trainable(3, torch.float32, lora_dropout=0.5)
    layers = model.base_model.model
    x, names = torch.randn(4, 64), ["a1", None, "a0", "a2"]
    step(model, x, names)

    def together(between: Any = None, others: Any = names) -> list[int]:
        """Modules of each launch of q and k, where k's values are those of a lone call."""
        launches.clear()
        own = x.clone()
        with adapters(model, names):
            layers.q(own)
            if between is not None:
                between(own)
            if others is names:
                found = layers.k(own)
            else:
                with adapters(model, others):
                    found = layers.k(own)
        made = launches.of("mixed_shrink")
        with adapters(model, others):
            assert torch.equal(found, layers.k(own.clone()))
        return made

    assert together() == [3]
    assert together(lambda own: own.mul_(2)) == [3, 2]  # v has yet to be called
    assert together(others=["a2", "a1", None, "a0"]) == [3, 2]
    weight = layers.k.lora_A["a1"].weight
    assert together(lambda _: weight.detach().mul_(2)) == [3, 2]
    hook = layers.k.register_forward_hook(lambda *_: None)
    assert together() == [2, 1]
    hook.remove()
    layers.k.train()
    launches.clear()
    step(model, x, names)
    assert launches.of("mixed_shrink") == [2, 1, 1]
    assert notes(model)[1] == "3 layers, not shared: with dropout, each layer masks x separately"
    layers.q.impl = layers.k.impl = "eager"
    layers.k.eval()
    launches.clear()
    step(model, x, names)
    assert launches.of("mixed_shrink") == [1, 1]


def test_layers_that_threads_saw_beside_others() -> None:
    """q, k and v in one thread, k and v alone in another: each takes its own s afterwards."""
    model = trainable(2, torch.float32, target_modules=["q", "k", "v", "o"]).eval()
    layers, (x, e) = model.base_model.model, torch.randn(2, 4, 64)
    seen, go = [threading.Event() for _ in range(2)], threading.Event()

    def watch(number: int, *inputs: torch.Tensor) -> None:
        with torch.no_grad(), adapters(model, ["a0", "a1", None, "a0"]):
            for name, given in zip("qkv", inputs, strict=True):
                getattr(layers, name)(given)
            seen[number].set()
            go.wait()
            layers.o(torch.randn(4, 64))

    runs = [threading.Thread(target=watch, args=(0, x, x, x))]
    runs.append(threading.Thread(target=watch, args=(1, x, e, e)))
    for number, run in enumerate(runs):
        run.start()
        seen[number].wait()
    go.set()
    for run in runs:
        run.join()
    with torch.no_grad(), adapters(model, ["a0", "a1", None, "a0"]):
        found = layers(x)
    torch.testing.assert_close(found, step_of_all(eager(model), x))


def step_of_all(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What PyTorch makes of the same batch."""
    with torch.no_grad(), adapters(model, ["a0", "a1", None, "a0"]):
        result: torch.Tensor = model.base_model.model(x)
    return result


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_share_nothing(use_reentrant: bool, launches: Any) -> None:
    """A repeated forward must save what the first one saved."""
    model = trainable(3, torch.float32)
    x, names = torch.randn(4, 64), ["a1", None, "a0", "a2"]
    step(model, x, names)
    launches.clear()
    leaf = x.clone().requires_grad_()
    with adapters(model, names):
        y = torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=use_reentrant)
    # A reentrant one records nothing the first time, and shares as an evaluation does.
    assert launches.of("mixed_shrink") == ([3, 1] if use_reentrant else [1] * 4)
    launches.clear()
    y.pow(2).sum().backward()
    assert set(launches.of("mixed_shrink")) == {1}
    slow = eager(model)
    exact = step(copy.deepcopy(slow).double(), x.double(), names)
    near = yardstick(lambda: step(slow, x, names), exact)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compare({"y": y.detach(), "dx": leaf.grad, **found}, near, exact)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_compiled(launches: Any, autocast: bool) -> None:
    """One shrink and one pass for d_lora_a, one graph for any mix; a DoRA that drops beside."""
    torch._dynamo.reset()
    counters.clear()
    model, x = trainable(3, torch.float32), torch.randn(5, 64)
    config = fastlora.LoraConfig(r=4, target_modules=["q"], use_dora=True, lora_dropout=0.5)
    model.add_adapter("d", config)
    train_adapters(model, ["a0", "a1", "a2", "d"])
    model.base_model.model.q.lora_dropout["d"].train()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)

    def run(some: Any, given: torch.Tensor, names: Any, call: Any = None) -> Any:
        """As `step`; compiled graphs have zeros for adapters without rows."""
        leaf = given.detach().requires_grad_()
        on = autocast and given.dtype == torch.float32
        with (
            adapters(some, names, seeds={"d": 3}),
            torch.autocast(leaf.device.type, torch.half, enabled=on),
        ):
            y = (some if call is None else call)(leaf)
        y.to(torch.promote_types(y.dtype, torch.float32)).pow(2).sum().backward()
        found = {n: p.grad for n, p in some.named_parameters() if p.grad is not None}
        some.zero_grad(set_to_none=True)
        narrow = torch.half if on else given.dtype
        found = {"y": y.detach(), "dx": leaf.grad, **found}
        return {n: t.to(narrow) for n, t in found.items() if t.any() or n[1:] in ("", "x")}

    run(model, x, ["a1", "a0", None, "a2", "a0"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference, "draw_keep_mask", kernel_keep)
        mixes: list[Any] = [["a1", "d", None, "a2", "a0"], ["a0"] * 5]
        for names in mixes[autocast:]:
            launches.clear()
            found = run(model, x, names, compiled)
            assert launches.of("mixed_shrink") == [3, 1]  # of q, k and v; of o
            assert launches.of("mixed_grad_a") == [1, 3]
            slow = eager(model)
            exact = run(copy.deepcopy(slow).double(), x.double(), names)
            compare(found, yardstick(functools.partial(run, slow, x, names), exact), exact)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(note.endswith("3 layers share x") for note in notes(model)[:3])


def test_compiled_with_factors_of_several_dtypes(launches: Any) -> None:
    """They share all the same; a DoRA adapter whose dropout acts has no say in the dtype."""
    torch._dynamo.reset()
    model, x = trainable(2, torch.float16), torch.randn(3, 64).half()
    config = fastlora.LoraConfig(r=4, target_modules=["q"], use_dora=True, lora_dropout=0.5)
    model.add_adapter("d", config, autocast_adapter_dtype=False)
    layers = model.base_model.model
    layers.q.lora_A["d"].float()
    train_adapters(model, ["a0", "a1", "d"])
    layers.q.lora_dropout["d"].train()
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for wide in (False, True):
        if wide:
            for layer in lora_layers(model).values():
                layer.lora_A["a1"].float()
                layer.lora_B["a1"].float()
        step(model, x, ["a0", "a0", None])
        launches.clear()
        with adapters(model, ["a1", None, "a0"]):
            compiled(x).float().pow(2).sum().backward()
        assert launches.of("mixed_shrink") == [3, 1]
        assert launches.of("mixed_grad_a") == [1, 3]


def test_a_graph_that_nothing_traces_keeps_nothing() -> None:
    """Some siblings, twice over one x in one block: no share is left for another graph."""
    torch._dynamo.reset()
    model, x = trainable(2, torch.float32), torch.randn(3, 64, requires_grad=True)
    layers, names = model.base_model.model, ["a0", "a1", None]
    step(model, x, names)

    def some(x: torch.Tensor) -> torch.Tensor:
        return layers.q(x)[:, :32] * layers.k(x)

    compiled = torch.compile(some, backend="eager", fullgraph=True)
    with adapters(model, names):
        expected = some(x)
        for _ in range(2):
            found = compiled(x)
            found.sum().backward()
    torch.testing.assert_close(found, expected)
