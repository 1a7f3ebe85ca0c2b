"""Siblings without gradients: the first computes all of them, and nothing stale is ever taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.kernels import (
    lora_expand,
    lora_linear,
    lora_shrink,
    mixed_lora_expand,
    mixed_lora_linear,
)
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab


@pytest.fixture(autouse=True)
def on_the_labs_device(lab: Lab) -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with torch.device(lab.device):
        yield


@pytest.fixture
def launches(calls_of: Any) -> list[str]:
    """Each launch of one adapter's kernels, and of how many modules."""
    seen: list[str] = []
    noted: list[tuple[Any, str, Callable[..., str]]] = [
        (lora_shrink, "shrink", lambda out, x, lora_a, **_: f"shrink {len(lora_a)}"),
        (lora_linear, "linear", lambda modules, *_, **__: f"linear {len(modules)}"),
        (lora_expand, "expand", lambda modules, *_, **__: f"expand {len(modules)}"),
    ]
    for module, name, note in noted:
        calls_of(module, f"launch_lora_{name}", note, seen)
    return seen


class Attention(nn.Module):
    """Three linears fed by one tensor, of different sizes, and one behind them.

    ``between`` runs before the second is called, with its input, and returns what it is called
    with.
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 48, bias=bias), nn.Linear(32, 16, bias=bias)
        self.v, self.o = nn.Linear(32, 16, bias=bias), nn.Linear(80, 32, bias=bias)
        self.between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        q = self.q(x)
        x = self.between(x)
        return self.o(torch.cat([q, self.k(x), self.v(x)], -1))


def model_of(bias: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Two adapters over `Attention` at random, in evaluation on kernels; siblings are known."""
    torch.manual_seed(0)
    made = fastlora.LoraConfig(r=6, target_modules=["q", "k", "v", "o"], **config)
    model = fastlora.get_peft_model(Attention(bias), made, adapter_name="a")
    model.add_adapter("b", made)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3)
    model.to(dtype).eval()
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "triton"
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 32, dtype=dtype))
    return model


def plain(model: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The model in PyTorch, from its weights as they are."""
    attention = model.base_model.model

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(attention, name)
        (adapter,) = layer._active_adapters
        a, b = (layer._modules[f"lora_{end}"][adapter].weight.to(dtype) for end in "AB")
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = nn.functional.linear(x, layer.weight.to(dtype), bias)
        return y + (x @ a.t() @ b.t()) * layer.scaling[adapter]

    with torch.no_grad():
        x = x.to(dtype)
        q, after = linear("q", x), attention.between(x)
        return linear("o", torch.cat([q, linear("k", after), linear("v", after)], -1))


def check(model: Any, x: torch.Tensor, found: torch.Tensor) -> None:
    """Compares an output with float64."""
    expected, truth = plain(model, x, x.dtype), plain(model, x, torch.float64)
    assert_within_budget(found, expected, truth)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel"), [((1, 32), "linear"), ((3, 9, 32), "linear"), ((90, 32), "expand")]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_launch_makes_all_three(
    launches: list[str],
    dtype: torch.dtype,
    mode: Callable[[], Any],
    shape: tuple[int, ...],
    kernel: str,
    bias: bool,
) -> None:
    """At many rows the library's products accumulate on what one expand wrote."""
    model = model_of(bias, dtype)
    with mode():
        x = torch.randn(shape, dtype=dtype)
        launches.clear()
        y = model(x)
    assert launches == ["shrink 3", f"{kernel} 3", "shrink 1", f"{kernel} 1"]
    assert y.shape == shape
    check(model, x.clone(), y.clone())


def test_inference_mode_alone_finds_out_that_nobody_writes(launches: list[str]) -> None:
    """Nobody counts writes into its tensors: their elements are compared, once."""
    model = model_of()
    fresh = fastlora.get_peft_model(Attention(), model.peft_config["a"])
    for module in fresh.modules():
        if hasattr(module, "impl"):
            module.impl = "triton"
    fresh.eval()
    with torch.inference_mode():
        x = torch.randn(2, 32)
        for _ in range(2):
            launches.clear()
            fresh(x)
    assert launches[:2] == ["shrink 3", "linear 3"]


def test_inference_mode_with_a_write_between(launches: list[str]) -> None:
    model = fastlora.get_peft_model(
        Attention(), fastlora.LoraConfig(r=4, target_modules=["q", "k", "v", "o"])
    ).eval()
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "triton"
    model.base_model.model.between = lambda x: x.add_(1.0)
    with torch.inference_mode():
        for _ in range(3):
            launches.clear()
            x = torch.randn(2, 32)
            before, y = x.clone(), model(x)
        assert "shrink 3" not in launches
        y, before = y.clone(), before.clone()
    model.base_model.model.between = lambda x: x + 1.0
    check(model, before.clone(), y.clone())


CHANGES: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "another tensor": lambda m, x: x * 2.0,
    "a write into x": lambda m, x: x.add_(1.0),
    "a write into a weight": lambda m, x: m.k.weight.mul_(2.0),
    "a write into a bias": lambda m, x: m.v.bias.add_(1.0),
    "a write into lora_A": lambda m, x: m.k.lora_A["a"].weight.mul_(2.0),
    "a write into lora_B": lambda m, x: m.v.lora_B["a"].weight.mul_(2.0),
    "a new weight": lambda m, x: setattr(
        m.k, "weight", nn.Parameter(torch.randn(16, 32), requires_grad=False)
    ),
    "another adapter": lambda m, x: m.v.set_adapter("b"),
    "another scaling": lambda m, x: m.k.scaling.__setitem__("a", 0.125),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_calls_is_seen(change: str) -> None:
    """What the first computed for a sibling is not taken where the sibling would compute other."""
    model = model_of()
    attention, x = model.base_model.model, torch.randn(3, 32)
    before = x.clone()
    of_x = change in ("another tensor", "a write into x")

    def between(given: torch.Tensor) -> torch.Tensor:
        made: Any = CHANGES[change](attention, given)
        return made if of_x else given

    with torch.no_grad():
        attention.between = between
        y = model(x)
    # The first of them was computed before the change, which is not about it.
    after = {"another tensor": lambda x: x * 2.0, "a write into x": lambda x: x + 1.0}
    attention.between = after.get(change, lambda x: x)
    check(model, before, y)


def test_changes_between_forwards_are_seen(launches: list[str]) -> None:
    model = model_of()
    attention, x = model.base_model.model, torch.randn(3, 32)
    with torch.no_grad():
        for change in (
            lambda: attention.q.lora_B["a"].weight.mul_(3.0),
            lambda: model.set_adapter("b"),
            lambda: attention.k.lora_A["b"].weight.data.mul_(2.0),
            lambda: setattr(attention.v, "weight", nn.Parameter(torch.randn(16, 32))),
        ):
            change()
            check(model, x, model(x))
            launches.clear()
            check(model, x, model(x))
            assert launches[0] == "shrink 3", "they are found again"


@pytest.mark.parametrize(
    "alone", ["two adapters", "merged", "dropout", "hooked factor", "another impl"]
)
def test_who_is_not_computed_with_the_others(alone: str, launches: list[str]) -> None:
    """The others still are."""
    model = model_of()
    attention, x = model.base_model.model, torch.randn(3, 32)
    k = attention.k
    with contextlib.ExitStack() as stack, torch.no_grad():
        if alone == "two adapters":
            k.set_adapter(["a", "b"])
        elif alone == "merged":
            k.merge()
            stack.callback(k.unmerge)
        elif alone == "dropout":
            k.lora_dropout["a"] = nn.Dropout(0.5).train()
        elif alone == "hooked factor":
            handle = k.lora_A["a"].register_forward_hook(lambda *_: None)
            k.impl = "auto"
            stack.callback(handle.remove)
        else:
            k.impl = "eager"
        model(x)  # finds that one of them did not take what was made for it
        launches.clear()
        model(x)
    assert "linear 3" not in launches
    assert "linear 2" in launches or alone in ("another impl", "hooked factor")


def test_a_graph_and_gradients_do_without() -> None:
    """With gradients layers share their shrink alone, and each has its own output."""
    model, x = model_of(), torch.randn(3, 32)
    y = model(x)
    assert y.requires_grad
    check(model, x, y.detach())


def test_outputs_are_ones_own(launches: list[str]) -> None:
    """Writing into one output, as models do, leaves the others alone."""
    model, x = model_of(), torch.randn(3, 32)
    attention = model.base_model.model
    launches.clear()
    with torch.no_grad():
        q, k = attention.q(x), attention.k(x)
        q.zero_()
        again = attention.k(x)
        v = attention.v(x)
    torch.testing.assert_close(k, again)
    assert v.any() and launches.count("linear 3") == 1


# ------------------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mixed_batch_in_one_launch(
    calls_of: Any, dtype: torch.dtype, mode: Callable[[], Any], many: bool
) -> None:
    """Few adapters a row tile are fused; of many an expand adds to the library's products."""
    model, rows = model_of(dtype=dtype), 80 if many else 5
    ids = [("a", "b", None)[row % 3] for row in range(rows)]
    seen: list[int] = []
    for kernel in (mixed_lora_linear, mixed_lora_expand):
        name = kernel.__name__.rpartition(".")[2]
        calls_of(kernel, f"launch_{name}", lambda ys, *_, **__: len(ys), seen)
    with mode():
        x = torch.randn(rows, 32, dtype=dtype)
        with fastlora.adapters(model, ids):
            for _ in range(2):
                seen.clear()
                y = model(x)
    assert seen == [3, 1]
    use_eager(model)
    with torch.no_grad():
        x, y = x.clone(), y.clone()
        results = []
        for kind in (dtype, torch.float64):
            with fastlora.adapters(model.to(kind), ids):
                results.append(model(x.to(kind)))
    assert_within_budget(y, *results)


@pytest.mark.parametrize("change", ["a write into a weight", "a new weight", "another tensor"])
def test_a_change_between_the_calls_of_a_mixed_batch(change: str) -> None:
    model, x = model_of(), torch.randn(6, 32)
    attention, ids = model.base_model.model, ["a", "b"] * 3
    with torch.no_grad(), fastlora.adapters(model, ids):
        model(x)
        attention.q(x)
        made: Any = CHANGES[change](attention, x)
        given = made if change == "another tensor" else x
        k, v = attention.k(given), attention.v(given)
    use_eager(model)
    with torch.no_grad(), fastlora.adapters(model, ids):
        torch.testing.assert_close(k, attention.k(given))
        torch.testing.assert_close(v, attention.v(given))


def use_eager(model: Any) -> None:
    """Has PyTorch compute."""
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "eager"
