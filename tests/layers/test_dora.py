"""DoRA on one layer: rows of zeros, where training starts, 16-bit magnitudes, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.testing import assert_within_budget
from fastlora.validation import UnsupportedLayerError
from tests.support.dora_truth import (
    dora,
    layer_of,
    make_problem,
    parameters_of,
)


def gradients(
    y: torch.Tensor, tensors: list[torch.Tensor | None], dy: torch.Tensor
) -> list[torch.Tensor]:
    """Of those tensors that are there."""
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    """Wider parameters under bf16 autocast: as a bf16 layer, and the norm as that of theirs."""
    problem = make_problem(12, 24, 20, 4, torch.bfloat16)
    layer = layer_of(problem.to(dtype), 6, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(problem.x.float())
    assert y.dtype == torch.bfloat16
    same = dora(problem, 1.5)
    truth = dora(problem.to(torch.float64), 1.5)
    assert_within_budget(y.detach(), same, truth)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_row_gives_zero(dtype: torch.dtype) -> None:
    """A row of the adapted weight that is 0 gives 0 and finite gradients, where PEFT gives NaN."""
    problem = make_problem(7, 6, 5, 2, dtype, bias=False)
    problem.weight[2], problem.lora_b[2], problem.magnitude[2] = 0, 0, 0
    problem.magnitude[4] = 0
    for p in (0.0, 0.5):
        layer = layer_of(problem, 2, p)
        x = problem.x.detach().requires_grad_(True)
        y = layer(x)
        if not p:
            assert (y[:, [2, 4]] == 0).all()
        found = gradients(y, [x, *parameters_of(layer)], torch.ones_like(y))
        assert all(bool(torch.isfinite(t).all()) for t in (y, *found))
        assert found[-1][2] == 0 and found[-1][4] != 0


def test_training_starts_at_the_base_layer() -> None:
    """The first magnitude is the norm of each row, as in PEFT, so the layer is its base layer."""
    linear = nn.Linear(20, 24)
    expected = linear(torch.ones(3, 20))
    layer = FastLoraLinear.from_linear(linear, r=4, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, linear.weight.norm(dim=1))
    assert magnitude.requires_grad and magnitude.dtype == torch.float32
    torch.testing.assert_close(layer(torch.ones(3, 20)), expected)
    random = FastLoraLinear.from_linear(linear, r=4, use_dora=True, init_lora_weights=False)
    weight = linear.weight + random.get_delta_weight("default")
    torch.testing.assert_close(
        random.lora_magnitude_vector["default"].weight.detach(), weight.detach().norm(dim=1)
    )


def test_small_changes_of_a_16_bit_magnitude_count() -> None:
    """g is 1 + 3 * 2**-9 in bf16, where it would be rounded to 1 + 2**-7."""
    layer = FastLoraLinear(64, 2048, bias=False, r=1, use_dora=True, dtype=torch.bfloat16)
    layer.lora_magnitude_vector.float()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    truth = x.double() @ layer.weight.double().t()
    norms = layer.weight.double().norm(dim=1)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(norms * (1 + 3 * 2**-9))
        ratio = (layer(x).double() * truth).sum() / truth.square().sum()
    assert abs(ratio - 1 - 3 * 2**-9) < 2**-11


def test_what_is_refused() -> None:
    """A weight that cannot be read; nothing has changed then."""

    class Opaque(nn.Module):
        in_features = out_features = 4

    wrapper = FastLoraWrapper(Opaque())
    with pytest.raises(UnsupportedLayerError, match="that of a Opaque is missing"):
        wrapper.add_adapter("a", use_dora=True)
    assert not wrapper.lora_A and not wrapper.r


def test_second_derivatives_raise() -> None:
    """As for LoRA."""
    layer = layer_of(make_problem(3, 6, 5, 2, torch.float32), 2, 0.0)
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
