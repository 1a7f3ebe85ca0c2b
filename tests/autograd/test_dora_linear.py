"""DoRA's one function over a frozen base without bias: gradients from y, and what y must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import FastLoraLinear
from fastlora.autograd import dora
from fastlora.testing import assert_within_budget
from tests.support.dora_truth import Problem, make_problem
from tests.support.dora_truth import dora as plain_dora

TRAINED = ("x", "lora_a", "lora_b", "magnitude")


def layer_of(problem: Problem, use_dora: bool = True) -> Any:
    """A layer over a frozen base that holds the operands; scaling 0.75."""
    n, k = problem.weight.shape
    r = problem.lora_a.shape[0]
    linear = nn.Linear(k, n, bias=False, dtype=problem.weight.dtype)
    layer = FastLoraLinear.from_linear(linear, r=r, lora_alpha=0.75 * r, use_dora=use_dora)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.lora_A["default"].weight.copy_(problem.lora_a)
        layer.lora_B["default"].weight.copy_(problem.lora_b)
        if use_dora:
            layer.lora_magnitude_vector["default"].weight.copy_(problem.magnitude)
    return layer


def trained(layer: Any) -> list[torch.Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


def results_of(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of `TRAINED`."""
    x = x.detach().requires_grad_(True)
    y = layer(x)
    named = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    parameters = [module["default"].weight for module in named]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def truth_of(problem: Problem, dtype: torch.dtype, dy: torch.Tensor) -> list[torch.Tensor]:
    """The same of the plain formula in another dtype."""
    operands = problem.to(dtype)
    y = plain_dora(operands, 0.75)
    wanted = [getattr(operands, name) for name in TRAINED]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


CASES = [
    (1, 64, 48, 1, torch.float32),
    (15, 33, 100, 4, torch.float32),
    (127, 130, 72, 16, torch.bfloat16),
    (2000, 48, 33, 3, torch.bfloat16),
    (17, 600, 31, 8, torch.bfloat16),
    (16, 40, 65, 64, torch.float16),
    (2000, 33, 48, 128, torch.float32),
    (17, 20, 31, 8, torch.float64),
]


@pytest.mark.parametrize("magnitudes", ["norms", "small", "some zero, some negative"])
@pytest.mark.parametrize(("m", "n", "k", "r", "dtype"), CASES, ids=str)
def test_values_and_every_gradient(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, magnitudes: str
) -> None:
    """Against float64, also where y holds nothing of u, or too little to divide."""
    problem = make_problem(m, n, k, r, dtype, bias=False)
    if magnitudes == "small":
        problem.magnitude.mul_(2.0**-12)
    elif magnitudes != "norms":
        problem.magnitude[::3] = 0
        problem.magnitude[1::3] *= -1
    dy = torch.randn(m, n).to(dtype)
    if m == 127:
        dy = torch.randn(n, m).to(dtype).t()
    elif m == 17:
        dy = torch.randn(1, 1).to(dtype).expand(m, n)
    mine = results_of(layer_of(problem), problem.x, dy)
    same, truth = truth_of(problem, dtype, dy), truth_of(problem, torch.float64, dy)
    for name, own, plain, exact in zip(("y", *TRAINED), mine, same, truth, strict=True):
        assert own.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(own, exact)
        else:
            assert_within_budget(own, plain, exact, name)


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)], ids=str)
@pytest.mark.parametrize("write", ["whole", "part", "relu_"])
def test_an_output_may_be_written_into(
    use_dora: bool, shape: tuple[int, ...], write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an `nn.Linear` may: gradients are those of a write into a copy."""
    layer = layer_of(make_problem(1, 24, 20, 4, torch.float64, bias=False), use_dora)
    again: list[int] = []
    plain = dora.scale_columns_backward
    monkeypatch.setattr(
        dora, "scale_columns_backward", lambda *args: again.append(1) or plain(*args)
    )
    x = torch.randn(*shape, dtype=torch.float64)
    results = []
    for copies in (False, True):
        own = x.clone().requires_grad_(True)
        y = layer(own)
        y = y.clone() if copies else y
        if write == "whole":
            y.mul_(3.0)
        elif write == "part":
            y[..., :5].add_(y[..., 5:10] * 2)
        else:
            y.relu_()
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [own, *trained(layer)])])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
    assert len(again) == use_dora  # made again for the first, not for the second


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_output_may_be_written_into(reentrant: bool) -> None:
    """Within the checkpoint and behind it, with a graph that is kept for a second backward."""
    layer = layer_of(make_problem(1, 24, 20, 4, torch.float64, bias=False))
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)

    def block(t: torch.Tensor) -> torch.Tensor:
        return layer(t).mul_(3.0)

    plain = layer(x) * 3.0 + 1.0
    y = checkpoint(block, x, use_reentrant=reentrant)
    y = y.add_(1.0)
    expected = torch.autograd.grad(plain.pow(2).sum(), [x, *trained(layer)])
    for _ in range(1 if reentrant else 2):
        layer.zero_grad()
        x.grad = None
        y.pow(2).sum().backward(retain_graph=not reentrant)
        for tensor, value in zip([x, *trained(layer)], expected, strict=True):
            torch.testing.assert_close(tensor.grad, value)


@pytest.mark.parametrize("bias", [False, True])
def test_a_forward_without_gradients_has_the_bits_of_one_with(bias: bool) -> None:
    """As a reentrant checkpoint's first forward must."""
    problem = make_problem(600, 700, 500, 8, torch.float32, bias=False)
    layer = layer_of(problem)
    if bias:
        layer.bias = nn.Parameter(torch.randn(700), requires_grad=False)
    plain = layer(problem.x).detach()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(problem.x), plain)
    with torch.inference_mode():
        inferred = layer(problem.x)
    truth = plain_dora(problem.to(torch.float64), 0.75).detach()
    truth = truth + layer.bias.double() if bias else truth
    assert_within_budget(inferred.clone(), plain, truth)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("n", [24, 64])
def test_the_output_is_what_is_saved(n: int, p: float) -> None:
    """No second result of y's size, and none at all where the magnitude is frozen."""
    problem = make_problem(48, n, 20, 4, torch.bfloat16, bias=False)
    for frozen in (False, True):
        layer = layer_of(problem)
        layer.lora_dropout["default"] = nn.Dropout(p)
        layer.lora_magnitude_vector.requires_grad_(not frozen)
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(problem.x)
        large = [t.data_ptr() for t in saved if t.shape == y.shape]
        assert len(large) == (not frozen)
        assert p or large in ([], [y.data_ptr()])
        assert y.untyped_storage().nbytes() == y.nbytes
