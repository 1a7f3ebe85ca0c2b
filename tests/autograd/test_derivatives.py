"""Second derivatives raise an error, and tangents of forward mode are right or raise one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastlora
from fastlora import LoraConfig

X = torch.randn(4, 8)
MANY = torch.randn(1200, 8)


def model(trainable: bool = True, **options: Any) -> Any:
    """Two adapters on one linear layer, with factors that are not zero."""
    made = fastlora.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"], **options), "a"
    )
    made.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made


def mixed(made: Any, x: torch.Tensor) -> torch.Tensor:
    """The output for a batch with two adapters."""
    with fastlora.adapters(made, ["a", "b", None, "a"]):
        y: torch.Tensor = made(x)
    return y


def active(made: Any, x: torch.Tensor) -> torch.Tensor:
    """The output with the active adapter."""
    y: torch.Tensor = made(x)
    return y


def seeded(
    call: Callable[[Any, torch.Tensor], torch.Tensor], made: Any, x: torch.Tensor
) -> torch.Tensor:
    """The output with the same dropout masks each time."""
    torch.manual_seed(0)
    return call(made, x)


CALLS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], torch.Tensor, dict[str, Any]]]
CALLS = {
    "mixed": (mixed, X, {}),
    "mixed, DoRA": (mixed, X, {"use_dora": True}),
    "DoRA": (active, X, {"use_dora": True}),
    "many rows": (active, MANY, {}),
    "dropout": (active, X, {"lora_dropout": 0.5}),
}


@pytest.mark.parametrize("case", CALLS)
def test_second_derivatives_raise(case: str) -> None:
    """Also where no incoming gradient requires a gradient, and for some of the inputs."""
    call, x, options = CALLS[case]
    made, x = model(**options), x.clone().requires_grad_()
    weights = [p for p in made.parameters() if p.requires_grad]
    for inputs in ([x], weights, [x, *weights]):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(call(made, x).sum(), inputs, create_graph=True, allow_unused=True)
    torch.autograd.grad(call(made, x).sum(), x, retain_graph=True)


@pytest.mark.parametrize("case", CALLS)
def test_batched_gradients(case: str) -> None:
    """They are right where PyTorch's operations batch them; elsewhere an error says what to do."""
    call, x, options = CALLS[case]
    made, x = model(**options), x.clone().requires_grad_()
    y = call(made, x)
    batch = torch.randn(3, *y.shape)

    def gradients() -> torch.Tensor:
        (found,) = torch.autograd.grad(y, x, batch, retain_graph=True, is_grads_batched=True)
        return found

    if case == "many rows":
        each = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in batch]
        torch.testing.assert_close(gradients(), torch.stack(each))
    else:
        with pytest.raises(RuntimeError, match="compute one gradient at a time"):
            gradients()


def test_second_derivatives_of_few_rows() -> None:
    """PyTorch's own autograd nodes compute them."""
    made, x = model(), X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(made(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    layer = made.base_model.model[0]
    a, b = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    whole = (layer.weight + layer.scaling["a"] * b @ a).double()
    torch.testing.assert_close(second, (2 * whole.T @ whole).sum(0).float().expand_as(second))


@pytest.mark.parametrize("in_functorch", [True, False])
@pytest.mark.parametrize("case", CALLS)
def test_forward_mode_of_frozen_layers(case: str, in_functorch: bool) -> None:
    """The tangent contains the update; trainable layers raise an error."""
    call, x, options = CALLS[case]
    made, tangent = model(trainable=False, **options), torch.randn_like(x)
    with torch.no_grad():  # The outputs are affine in x, also with dropout.
        expected = seeded(call, made, tangent) - seeded(call, made, torch.zeros_like(x))

    def run() -> torch.Tensor:
        if in_functorch:
            found: torch.Tensor = torch.func.jvp(lambda x: seeded(call, made, x), (x,), (tangent,))[
                1
            ]
            return found
        with forward_ad.dual_level():
            y = seeded(call, made, forward_ad.make_dual(x, tangent))
            return forward_ad.unpack_dual(y).tangent

    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(RuntimeError, match=r"functorch|jvp"):
        run()
