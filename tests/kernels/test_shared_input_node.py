"""A group with gradients: one node of the graph makes every y, one dx, and all other gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.testing import assert_within_budget
from tests.support.kernels.shared_input_models import NAMES, apart, in_pytorch, model_of

pytestmark = pytest.mark.usefixtures("on_the_labs_device")


def run(model: Any, x: torch.Tensor, call: Any = None) -> list[torch.Tensor | None]:
    """The output, and the gradients of x and of every parameter."""
    torch.manual_seed(4)
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = (model if call is None else call)(x)
    y.pow(2).mean().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def check(model: Any, x: torch.Tensor, found: list[torch.Tensor | None]) -> None:
    """Compares what `run` gave with float64."""
    expected = run(in_pytorch(model, x.dtype), x)
    truth = run(in_pytorch(model, torch.float64), x.double())
    for number, (mine, plain, exact) in enumerate(zip(found, expected, truth, strict=True)):
        assert (mine is None) == (plain is None), number
        if mine is not None and plain is not None and exact is not None:
            assert_within_budget(mine, plain, exact, f"result {number}")


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 32), (2, 9, 32), (70, 32)])
def test_values_and_every_gradient(
    launches: list[str], dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    """At many rows each product of the backward accumulates on what those before it made."""
    model = model_of(bias, dtype)
    for name, parameter in model.named_parameters():
        # A base layer that trains beside frozen ones, and a factor that does not.
        parameter.requires_grad_("lora_" in name and ".v.lora_A" not in name)
        if ".k." in name and "lora_" not in name:
            parameter.requires_grad_(True)
    x = torch.randn(shape, dtype=dtype)
    launches.clear()
    found = run(model, x)
    kernel = "linear" if x[..., 0].numel() <= 64 else "expand"
    assert launches[:4] == ["shrink 3", f"{kernel} 3", "shrink 1", f"{kernel} 1"]
    assert launches.count("grad_b 1") == 4 and launches.count("grad_a 2") == 1
    check(model, x, found)


def test_one_node_for_three_and_what_it_saves() -> None:
    """x once, s once for all, parameters and scalings: nothing else."""
    model = model_of()
    attention, x = model.base_model.model, torch.randn(7, 32, requires_grad=True)
    q, k, v = attention.q(x), attention.k(x), attention.v(x)
    assert q.grad_fn is k.grad_fn is v.grad_fn
    known = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    saved = [t for t in q.grad_fn.saved_tensors if t is not None]
    rest = [tuple(t.shape) for t in saved if t.data_ptr() not in known]
    assert sorted(rest) == [(), (), (), (7, 18)]
    for module in attention.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.requires_grad_(False)
    saved = attention.q(x).grad_fn.saved_tensors
    assert saved[0] is None, "x is for lora_A alone"


@pytest.mark.parametrize("used", ["q", "k", "kv"])
def test_outputs_that_nobody_uses(used: str) -> None:
    """Their factors get no gradient, the others the gradients that they get alone."""
    model, x = model_of(), torch.randn(5, 32)

    def some(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        attention = model.base_model.model

        def call(x: torch.Tensor) -> torch.Tensor:
            made = {name: getattr(attention, name)(x) for name in "qkv"}
            return torch.cat([made[name] for name in used], -1)

        return call

    found, alone = run(model, x, some(model)), apart(model)
    expected = run(alone, x, some(alone))
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other)


def test_the_same_gradient_for_two() -> None:
    """As where outputs are added: one tensor comes in twice."""
    model, x = model_of(), torch.randn(5, 32)

    def of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        attention = model.base_model.model
        return lambda x: attention.k(x) + attention.v(x)

    alone = apart(model)
    for mine, other in zip(run(model, x, of(model)), run(alone, x, of(alone)), strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other)


def test_dropout_masks_are_those_of_layers_apart(launches: list[str]) -> None:
    """Seeds are drawn in the same order; one pass over x makes every d_lora_a."""
    model, x = model_of(lora_dropout=0.4), torch.randn(6, 32)
    launches.clear()
    found = run(model, x)
    assert launches.count("grad_a 3") == 1 and launches.count("shrink 1") == 4
    expected = run(apart(model), x)
    for mine, other in zip(found, expected, strict=True):
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other)
    assert torch.equal(found[0], expected[0])  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Any], object]] = {
    "another tensor": lambda m: None,
    "a new weight": lambda m: setattr(m.k, "weight", nn.Parameter(torch.randn(16, 32))),
    "another scaling": lambda m: m.k.scaling.__setitem__("default", 0.125),
    "another adapter": lambda m: m.v.set_adapter("other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_calls_is_seen(change: str) -> None:
    """What the first computed for a sibling is not taken where the sibling would compute other."""
    model, x = model_of(), torch.randn(3, 32)
    attention, factor = model.base_model.model, 2.0 if change == "another tensor" else 1.0
    model(x)

    def between(given: torch.Tensor) -> torch.Tensor:
        CHANGES[change](attention)
        return given if factor == 1.0 else given * factor

    attention.between = between
    found = run(model, x)
    attention.between = lambda x: x * factor
    check(model, x, found)


def test_a_write_into_what_a_graph_has_saved_raises() -> None:
    """As autograd does; the outputs are those of the weights at each layer's call."""
    model, x = model_of(), torch.randn(3, 32)
    attention = model.base_model.model

    def between(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            attention.k.weight.mul_(2.0)
        return given

    attention.between = between
    y = model(x)
    attention.between = lambda x: x
    torch.testing.assert_close(y, in_pytorch(model, torch.float32)(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_and_none_stay_separate() -> None:
    """What was made without gradients is not taken with them, and the other way round."""
    model, x = model_of(), torch.randn(3, 32)
    attention = model.base_model.model
    with torch.no_grad():
        attention.q(x)
    assert attention.k(x).requires_grad
    attention.q(x)
    with torch.no_grad():
        assert not attention.k(x).requires_grad


def test_an_input_without_a_gradient() -> None:
    """As that of a model's first layer behind a frozen embedding."""
    model, x = model_of(), torch.randn(5, 32)
    attention, alone = model.base_model.model, apart(model)
    for found in (model, alone):
        found.zero_grad(set_to_none=True)
        found(x).sum().backward()
    assert attention.q(x).grad_fn is attention.k(x).grad_fn
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
def test_outputs_may_be_written_into(shape: tuple[int, ...]) -> None:
    """Each is a tensor of its own to autograd, and no view."""
    model, x = model_of(), torch.randn(shape)

    def of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        attention = model.base_model.model
        return lambda x: attention.q(x).mul_(2.0)[..., :16] * attention.k(x).add_(1.0)

    alone = apart(model)
    for mine, other in zip(run(model, x, of(model)), run(alone, x, of(alone)), strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("which", ["lora_bias", "none acts"])
def test_a_layer_that_is_not_of_this_group(launches: list[str], which: str) -> None:
    """It is called between the others, and leaves what they share alone."""
    model, x = model_of(), torch.randn(5, 32)
    k = model.base_model.model.k
    if which == "lora_bias":
        k.add_adapter("biased", r=6, lora_alpha=4, lora_bias=True)
        nn.init.normal_(k.lora_B["biased"].weight, std=0.3)
    k.set_adapter(["biased"] if which == "lora_bias" else [])
    alone = ["shrink 1", "linear 1"]
    expected = ["shrink 2", "linear 2", *(alone if which == "lora_bias" else []), *alone]
    model(x)  # finds that it does not take what was made for it
    for _ in range(2):
        launches.clear()
        found = run(model, x)
        assert launches[: len(expected) + 1] == [*expected, "grad_b 1"]
    check(model, x, found)


class Behind(torch.optim.SGD):
    """Writes where no version is counted, as fused optimizers do."""

    def step(self, closure: Any = None) -> None:
        """Doubles every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2.0)


def test_a_step_ends_what_a_forward_left() -> None:
    """k was not called in the forward that computed it; x is the same tensor in the next one."""
    model, x = model_of(), torch.randn(5, 32)
    attention = model.base_model.model
    attention.q(x)
    Behind(attention.k.lora_B.parameters(), lr=0.1).step()
    torch.testing.assert_close(attention.k(x), apart(model).base_model.model.k(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_repeats_what_it_did(use_reentrant: bool) -> None:
    """Layers are apart within one, whatever is known of their siblings."""
    model, x = model_of(), torch.randn(5, 32)
    found = run(model, x, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    check(model, x, found)
    assert "activation checkpointing" in fastlora.fusion_report(model).rows[0].shared_input
    model(x)
    assert "3 layers share x" in fastlora.fusion_report(model).rows[0].shared_input


def test_a_reentrant_checkpoint_repeats_its_masks() -> None:
    """Its first run records nothing, and something else draws between the siblings' calls."""
    model, x, seen = model_of(lora_dropout=0.4), torch.randn(5, 32, requires_grad=True), []
    attention = model.base_model.model

    def between(given: torch.Tensor) -> torch.Tensor:
        F.dropout(torch.ones(4), 0.5)
        return given

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append(model(x))
        return seen[-1]

    attention.between = between
    checkpoint(body, x, use_reentrant=True).sum().backward()
    first, repeated = seen
    torch.testing.assert_close(first, repeated)


@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_requires_grad_that_changes_between_the_calls(trains: bool, x_trains: bool) -> None:
    """It counts at each layer's own call, as that of layers apart."""
    model, x = model_of(), torch.randn(5, 32, requires_grad=x_trains)
    attention = model.base_model.model
    factors = [attention.k.lora_A["default"].weight, attention.k.lora_B["default"].weight]

    def set_to(value: bool) -> None:
        for factor in factors:
            factor.requires_grad_(value)

    set_to(not trains)
    model(x.detach().requires_grad_(x_trains))
    attention.q(x)
    set_to(trains)
    y = attention.k(x)
    assert y.requires_grad == (trains or x_trains)
    if y.requires_grad:
        y.sum().backward()
    assert all((factor.grad is not None) == trains for factor in factors)
    assert (x.grad is not None) == x_trains


@pytest.mark.parametrize("needs", [True, False])
def test_an_input_that_begins_to_need_a_gradient(needs: bool) -> None:
    """And one that ceases to."""
    model, x = model_of(), torch.randn(5, 32, requires_grad=not needs)
    attention = model.base_model.model
    attention.q(x)
    x.requires_grad_(needs)
    attention.k(x).sum().backward()
    assert (x.grad is not None) == needs


@pytest.mark.parametrize("which", NAMES[:3])
def test_a_frozen_layer_needs_no_gradient(which: str) -> None:
    """Where x needs none either; its siblings train."""
    model, x = model_of(), torch.randn(5, 32)
    attention = model.base_model.model
    attention.get_submodule(which).requires_grad_(False)
    for _ in range(2):
        x = torch.randn(5, 32)
        made = {name: attention.get_submodule(name)(x) for name in NAMES[:3]}
        assert {name for name, y in made.items() if y.requires_grad} == {*NAMES[:3]} - {which}
    found = run(model, x)
    check(model, x, found)
    attention.get_submodule(which).lora_B.requires_grad_(True)
    for _ in range(3):
        model(torch.randn(5, 32))
    x = torch.randn(5, 32)
    assert attention.q(x).grad_fn is attention.k(x).grad_fn is attention.v(x).grad_fn


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("which", NAMES[:3])
@pytest.mark.parametrize("post", [True, False])
def test_hooks_of_a_parameter_are_not_called_for_nothing(which: str, post: bool) -> None:
    """Nobody uses the layer's y: its factors have no gradient that a hook could see."""
    model, seen = model_of(), []
    attention = model.base_model.model
    layer = attention.get_submodule(which)
    handles = []
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        register = factor.register_post_accumulate_grad_hook if post else factor.register_hook
        handles.append(register(lambda given: seen.append(given)))
    for _ in range(2):
        x = torch.randn(5, 32, requires_grad=True)
        made = {name: attention.get_submodule(name)(x).sum() for name in NAMES[:3]}
        sum(y for name, y in made.items() if name != which).backward()
    assert not seen
    model(x).sum().backward()
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    for _ in range(3):
        model(torch.randn(5, 32))
    assert attention.q(x).grad_fn is attention.k(x).grad_fn is attention.v(x).grad_fn


def test_an_x_that_a_transform_has_left_behind() -> None:
    model, left = model_of(), []

    def keep(x: torch.Tensor) -> torch.Tensor:
        left.append(x)
        return x.sum()

    x = torch.randn(5, 32)
    torch.func.grad(keep)(x)
    found = run(model, x, lambda _: model(left[0]))
    expected = run(model, x)
    for mine, own in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        torch.testing.assert_close(mine, own)


def test_a_grouped_layer_that_changed_its_dtype_in_place() -> None:
    """The first computes as before; the sibling's own call says what is wrong."""
    model, x = model_of(), torch.randn(5, 32)
    attention = model.base_model.model
    expected = attention.q(x)
    for _ in range(3):
        model(torch.randn(5, 32))
    attention.k.weight.data = attention.k.weight.data.half()
    for given in (x, x.clone()):
        torch.testing.assert_close(attention.q(given), expected)
        with pytest.raises(TypeError, match="weight has dtype"):
            attention.k(given)
    attention.k.weight.data = attention.k.weight.data.float()
    for _ in range(3):
        found = run(model, x)
    check(model, x, found)
    x = torch.randn(5, 32)
    assert attention.q(x).grad_fn is attention.k(x).grad_fn is attention.v(x).grad_fn
