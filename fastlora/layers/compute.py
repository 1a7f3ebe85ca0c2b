"""From a layer's adapters to one call of `fastlora.functional`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlora import functional
from fastlora.layers.factors import factors_of, scaling_of, why_not_fused
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.shared_shrink import shared_shrink
from fastlora.ops.factors import Factors
from fastlora.ops.invariant import refuse_in_mode
from fastlora.validation import ImplementationError

# Why a base layer that is called as it is has no place in the batch-invariant mode.
NOT_OUR_GEMM = "its base layer's own GEMM may go by the number of rows"


def refuse_triton(layer: AdapterLayer, names: list[str]) -> None:
    """Raises `ImplementationError` where kernels are to run and modules must be called instead."""
    if getattr(layer, "impl", "auto") == "triton":
        raise ImplementationError(f"impl='triton' cannot run: {why_not_fused(layer, names)}")


def _called(
    layer: AdapterLayer, y: torch.Tensor, x: torch.Tensor, names: list[str]
) -> torch.Tensor:
    """Adds adapters by calling their modules one by one, as PEFT does."""
    refuse_triton(layer, names)
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        inner = x.to(down.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x
        update = up(down(layer.lora_dropout[name](inner))) * scaling_of(layer, name)
        y = (y + update).to(y.dtype)
    return y


class _Together(NamedTuple):
    """The adapters that act, as few calls as can be.

    Attributes:
        adapters: One for each call.
        bias: Scaled lora_biases of adapters that became one call, ``[N]``; or None.
    """

    adapters: list[Factors]
    bias: torch.Tensor | None = None


def _together(layer: AdapterLayer, x: torch.Tensor, names: list[str]) -> _Together | None:
    """Returns the active adapters as one, unless dropout masks x for each alone.

    None where the modules of one of them must be called.
    """
    found = []
    for name in names:
        factors = factors_of(layer, name, x)
        if factors is None:
            return None
        found.append(factors)
    if len(found) == 1 or any(factors.dropout_p for factors in found):
        return _Together(found)
    biases = [f.lora_bias * f.scaling for f in found if f.lora_bias is not None]
    joined = Factors(
        torch.cat([factors.lora_a for factors in found]),
        torch.cat([factors.lora_b for factors in found], dim=1),
        torch.cat([factors.scaling.expand(factors.lora_a.shape[0]) for factors in found]),
    )
    return _Together([joined], sum(biases[1:], biases[0]) if biases else None)


def lora_forward(
    layer: AdapterLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    names: list[str],
    impl: str,
) -> torch.Tensor:
    """Runs a plain linear base layer and its active adapters fused.

    Args:
        layer: Holds the adapters.
        x: ``[..., K]``.
        weight: Base weight ``[N, K]``.
        bias: Base bias ``[N]`` or None.
        names: Active adapters that the layer has, at least one.
        impl: As in `fastlora.functional.lora_linear`.
    """
    others: list[Factors] = []
    if len(names) == 1:
        first = factors_of(layer, names[0], x)
        shrunk = None if first is None else shared_shrink(layer, x, first, impl)
    else:
        found, first, shrunk = _together(layer, x, names), None, None
        if found is not None:
            first, *others = found.adapters
            bias = bias if found.bias is None else _sum(bias, found.bias)
    if first is None:
        refuse_in_mode(layer, why_not_fused(layer, names))
        return _called(layer, F.linear(x, weight, bias), x, names)
    lora_a, lora_b, scaling, lora_bias, dropout_p, _ = first
    y = functional.linear(
        x, weight, bias, lora_a, lora_b, scaling, dropout_p, impl, "auto", shrunk, lora_bias
    )
    return _add(y, x, others, impl, inplace=True) if others else y


def _sum(bias: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if bias is None else bias + more


def lora_added_forward(
    layer: AdapterLayer,
    y: torch.Tensor,
    x: torch.Tensor,
    names: list[str],
    impl: str,
    inplace: bool,
) -> torch.Tensor:
    """Adds the active adapters to the output ``y [..., N]`` of a base layer called as it is."""
    refuse_in_mode(layer, NOT_OUR_GEMM)
    found = _together(layer, x, names)
    if found is None:
        return _called(layer, y, x, names)
    shrunk = shared_shrink(layer, x, found.adapters[0], impl) if len(names) == 1 else None
    y = _add(y, x, found.adapters, impl, inplace, shrunk)
    return y if found.bias is None else y + found.bias.to(y.dtype)


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: list[Factors],
    impl: str,
    inplace: bool,
    shrunk: functional.Shrunk | None = None,
) -> torch.Tensor:
    for lora_a, lora_b, scaling, lora_bias, dropout_p, _ in adapters:
        y = functional.add(
            y, x, lora_a, lora_b, scaling, dropout_p, impl, inplace, shrunk, None, lora_bias
        )
        inplace = True
    return y
