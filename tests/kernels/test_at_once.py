"""Siblings without gradients: the first computes all of them, and nothing stale is ever taken."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.layers.shared_input import known_group
from fastlora.testing import assert_within_budget
from tests.support.kernels.mixed_models import eager
from tests.support.kernels.shared_input_models import in_pytorch
from tests.support.kernels.shared_input_models import model_of as trained_model_of

pytestmark = pytest.mark.usefixtures("on_the_labs_device")
model_of = functools.partial(trained_model_of, train=False)


def check(model: Any, x: torch.Tensor, found: torch.Tensor) -> None:
    """Compares an output with float64."""
    with torch.no_grad():
        expected, truth = (in_pytorch(model, d)(x.to(d)) for d in (x.dtype, torch.float64))
    assert_within_budget(found, expected, truth)


@pytest.mark.drawn(1 / 2)
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
    fresh = model_of(known=False)
    with torch.inference_mode():
        x = torch.randn(2, 32)
        for _ in range(2):
            launches.clear()
            fresh(x)
    assert launches[:2] == ["shrink 3", "linear 3"]


def test_inference_mode_with_a_write_between(launches: list[str]) -> None:
    model = model_of(known=False)
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


def replace(parameter: torch.Tensor) -> None:
    """Replaces a parameter's memory twice: the second may be where the first was."""
    for _ in range(2):
        parameter.data = parameter.data * 2.0


CHANGES: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "another tensor": lambda m, x: x * 2.0,
    "a write into x": lambda m, x: x.add_(1.0),
    "a write into a weight": lambda m, x: m.k.weight.mul_(2.0),
    "a write into a bias": lambda m, x: m.v.bias.add_(1.0),
    "a write into lora_A": lambda m, x: m.k.lora_A["default"].weight.mul_(2.0),
    "a write into lora_B": lambda m, x: m.v.lora_B["default"].weight.mul_(2.0),
    "other memory of a weight": lambda m, x: replace(m.k.weight),
    "other memory of a bias": lambda m, x: replace(m.v.bias),
    "other memory of lora_A": lambda m, x: replace(m.k.lora_A["default"].weight),
    "a new weight": lambda m, x: setattr(
        m.k, "weight", nn.Parameter(torch.randn(16, 32), requires_grad=False)
    ),
    "another adapter": lambda m, x: m.v.set_adapter("other"),
    "another scaling": lambda m, x: m.k.scaling.__setitem__("default", 0.125),
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
            lambda: attention.q.lora_B["default"].weight.mul_(3.0),
            lambda: model.set_adapter("other"),
            lambda: attention.k.lora_A["other"].weight.data.mul_(2.0),
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
            k.set_adapter(["default", "other"])
        elif alone == "merged":
            k.merge()
            stack.callback(k.unmerge)
        elif alone == "dropout":
            k.lora_dropout["default"] = nn.Dropout(0.5).train()
        elif alone == "hooked factor":
            handle = k.lora_A["default"].register_forward_hook(lambda *_: None)
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
    """Writing into one output, as models do, leaves the others alone, those of later calls too."""
    model, x = model_of(), torch.randn(3, 32)
    attention = model.base_model.model
    launches.clear()
    with torch.no_grad():
        q, k = attention.q(x), attention.k(x)
        expected = k.clone()
        q.zero_()
        k.zero_()
        again = attention.k(x)
        v = attention.v(x)
    torch.testing.assert_close(again, expected)
    assert v.any() and launches.count("linear 3") == 1


def test_nothing_stays_cached_of_a_tensor_that_is_gone() -> None:
    """What a sibling left holds activations: nobody can take it once its input is gone."""
    model, x = model_of(), torch.randn(3, 32)
    group = known_group(model.base_model.model.q)
    with torch.no_grad():
        model.base_model.model.q(x)
        assert group is not None and group.entries
        del x
        assert not group.entries


# ------------------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mixed_batch_in_one_launch(
    launches: Any, dtype: torch.dtype, mode: Callable[[], Any], many: bool
) -> None:
    """Few adapters a row tile are fused; of many an expand adds to the library's products."""
    model, rows = model_of(dtype=dtype), 80 if many else 5
    ids = [("default", "other", None)[row % 3] for row in range(rows)]
    with mode():
        x = torch.randn(rows, 32, dtype=dtype)
        with fastlora.adapters(model, ids):
            for _ in range(2):
                launches.clear()
                y = model(x)
    fused, split = launches.of("mixed_linear"), launches.of("mixed_expand")
    assert (fused, split) == (([], [3, 1]) if many else ([3, 1], []))
    with torch.no_grad():
        x, y = x.clone(), y.clone()
        results = []
        for kind in (dtype, torch.float64):
            plain = in_pytorch(model, kind)
            with fastlora.adapters(plain, ids):
                results.append(plain(x.to(kind)))
    assert_within_budget(y, *results)


@pytest.mark.parametrize(
    "change",
    ["a write into a weight", "other memory of a weight", "a new weight", "another tensor"],
)
def test_a_change_between_the_calls_of_a_mixed_batch(change: str) -> None:
    model, x = model_of(), torch.randn(6, 32)
    attention, ids = model.base_model.model, ["default", "other"] * 3
    with torch.no_grad(), fastlora.adapters(model, ids):
        model(x)
        attention.q(x)
        made: Any = CHANGES[change](attention, x)
        given = made if change == "another tensor" else x
        k, v = attention.k(given), attention.v(given)
    plain = eager(model)
    attention = plain.base_model.model
    with torch.no_grad(), fastlora.adapters(plain, ids):
        torch.testing.assert_close(k, attention.k(given))
        torch.testing.assert_close(v, attention.v(given))
