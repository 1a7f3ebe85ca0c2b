"""What is kept of weights ends where they may have changed in ways that move no version."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import adapters
from fastlora.weight_marks import marks
from tests.support.tiny import TwoLayers, randomise

peft = pytest.importorskip("peft", reason="compares with PEFT")

NAMES: list[str | None] = ["a0", "a1", None, "a1"]
# What a layer or a model keeps: whether adapters use DoRA, and whether a batch mixes them.
KEPT = {"norms": (True, False), "packed": (False, True), "packed, DoRA": (True, True)}
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(library: str, dora: bool) -> Any:
    """Two adapters that both train, in evaluation."""
    made: Any = fastlora if library == "ours" else peft
    config = made.LoraConfig(r=4, target_modules=["q", "v"], use_dora=dora)
    torch.manual_seed(1)
    model = made.get_peft_model(TwoLayers(), config, "a0")
    model.add_adapter("a1", config)
    randomise(model)
    if library == "patched":
        fastlora.patch(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.eval()


def base_weight(model: Any) -> nn.Parameter:
    """The weight of the base layer of q."""
    return model.base_model.model.q.get_base_layer().weight


def outputs(model: Any, mixed: bool, call: Callable[..., Any] | None = None) -> torch.Tensor:
    """The model's rows, each of its adapter in ``NAMES`` where they are mixed."""
    call = model if call is None else call
    if not mixed:
        return call(X)
    with adapters(model, NAMES):
        return call(X)


def evaluate(model: Any, mixed: bool) -> torch.Tensor:
    """Often enough that all that can be kept is used."""
    with torch.no_grad():
        return [outputs(model, mixed) for _ in range(4)][-1]


def assert_seen(model: Any, mixed: bool, before: torch.Tensor) -> None:
    """A model that has kept something computes what a copy does, which has kept nothing."""
    expected = evaluate(copy.deepcopy(model), mixed)
    assert (expected - before).abs().max() > 0.01
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(outputs(model, mixed), expected)


def make_optimizer(model: Any, kind: str) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.1, fused=kind == "fused", foreach=kind == "foreach")


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_compiled_step(kept: str, kind: str) -> None:
    """Forward, backward and the optimizer's step in one compiled function; compiled once."""
    dora, mixed = KEPT[kept]
    model = build("ours", dora)
    optimizer = make_optimizer(model, kind)

    @torch.compile(backend="aot_eager")
    def step() -> None:
        outputs(model, mixed).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = evaluate(model, mixed)
    for _ in range(3):
        step()
        assert_seen(model, mixed, before)
        before = evaluate(model, mixed)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_our_part_of_a_compiled_step_compiles_once(kind: str) -> None:
    """Other marks are no reason to compile an optimizer's step again."""
    model = build("ours", True)
    optimizer = make_optimizer(model, kind)
    outputs(model, False).square().sum().backward()
    evaluate(model, False)
    step = torch.compile(optimizer.step, backend="aot_eager")
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            mark = marks.trained
            step()
            assert marks.trained is not mark


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("library", ["ours", "patched"])
def test_a_base_weight_that_is_frozen_again(library: str, compiled: bool, kind: str) -> None:
    """Its norms were kept while it was frozen; a step in between is all that tells."""
    model = build(library, True)
    before = evaluate(model, False)
    weight = base_weight(model).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], 0.1, fused=kind == "fused", foreach=kind == "foreach")
    call = torch.compile(model, backend="aot_eager") if compiled else model
    call(X).square().sum().backward()
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    weight.requires_grad_(False)
    evaluate(model, False)
    step()
    assert_seen(model, False, before)


def test_norms_of_a_frozen_base_weight_stay_through_steps() -> None:
    """A step of the adapters leaves them as they are; computing them anew costs a read of W."""
    model = build("ours", True)
    optimizer = make_optimizer(model, "fused")
    evaluate(model, False)
    kept = model.base_model.model.q._dora_norms.base
    outputs(model, False).square().sum().backward()
    optimizer.step()
    evaluate(model, False)
    assert model.base_model.model.q._dora_norms.base is kept


WRITES: dict[str, Callable[[Any], Any]] = {
    "lora_A": lambda layer: layer.lora_A["a1"].weight.data.mul_(3),
    "lora_B": lambda layer: layer.lora_B["a1"].weight.data.mul_(3),
    "base": lambda layer: layer.get_base_layer().weight.data.mul_(3),
}


@pytest.mark.parametrize("entered", [True, False], ids=["in training", "before training"])
@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("library", ["ours", "patched"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_write_through_data(kept: str, library: str, written: str, entered: bool) -> None:
    """Between train() and eval(), or just before: a change of mode ends all that is kept."""
    dora, mixed = KEPT[kept]
    model = build(library, dora)
    if not mixed:
        model.set_adapter("a1")
    before = evaluate(model, mixed)
    if entered:
        model.train()
        with torch.no_grad():
            outputs(model, mixed)  # as the first forward of a checkpoint
    WRITES[written](model.base_model.model.q)
    if not entered:
        model.train()
    model.eval()
    assert_seen(model, mixed, before)


@pytest.mark.parametrize("kept", ["packed", "packed, DoRA"])
@pytest.mark.parametrize("library", ["ours", "patched"])
@pytest.mark.parametrize("how", ["step", "gradient", "mode"])
def test_within_a_block(how: str, library: str, kept: str) -> None:
    """Evaluations on both sides of a change, and all of it within one block."""
    model = build(library, KEPT[kept][0])
    optimizer = make_optimizer(model, "fused")
    with adapters(model, NAMES):
        model(X).square().sum().backward()
        with torch.no_grad():
            before = [model(X) for _ in range(3)][-1]
            if how == "step":
                optimizer.step()
            elif how == "mode":
                model.train()
        if how == "gradient":
            model(X)
        if how != "step":  # behind a gradient: an optimizer that PyTorch knows nothing of
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.mul_(1.5)
        model.eval()
        with torch.no_grad():
            after = [model(X) for _ in range(3)]
    expected = evaluate(copy.deepcopy(model), True)
    assert (expected - before).abs().max() > 0.01
    for y in after:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("write", ["in place", "fused step"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_scaling_that_is_a_tensor(kept: str, write: str) -> None:
    """As PEFT's compiled hot swap makes them: written in place, it is the same object."""
    dora, mixed = KEPT[kept]
    model = build("patched", dora)
    if not mixed:
        model.set_adapter("a1")
    for layer in (model.base_model.model.q, model.base_model.model.v):
        layer.scaling["a1"] = torch.tensor(2.0)
    scaling = model.base_model.model.q.scaling["a1"]
    before = evaluate(model, mixed)
    if write == "in place":
        scaling.fill_(5.0)
    else:
        scaling.grad = torch.ones(())
        torch.optim.SGD([scaling], lr=3.0, fused=True).step()
    assert_seen(model, mixed, before)
