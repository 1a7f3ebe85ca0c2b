"""The adapters that are active on a layer, outside of mixed batches: one call for all rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.autograd.adapter import run_adapter
from fastlora.layers.factors import scaling_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.sharing import shared_shrink
from fastlora.layers.why import NOT_OUR_GEMM, refuse_triton, why_not_fused
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.ops.invariant import refuse_in_mode


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
        factors = layer._own_factors(name, x)
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


def run_active(layer: AdapterLayer, x: torch.Tensor, base: Base, names: list[str]) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer and its active adapters, none of them with DoRA.

    Args:
        layer: Holds the adapters.
        x: ``[..., K]``.
        base: The base layer.
        names: Of the adapters, at least one.
    """
    if base.weight is None:
        refuse_in_mode(layer, NOT_OUR_GEMM)
    found, shrunk = _Together([]), None
    if len(names) == 1:
        first = layer._own_factors(names[0], x)
        if first is not None:
            shrunk = shared_shrink(layer, x, Slots((first,)))
    else:
        together = _together(layer, x, names)
        found = found if together is None else together
        first = found.adapters[0] if found.adapters else None
    if first is None:
        refuse_in_mode(layer, why_not_fused(layer, names))
        return _called(layer, base.output(x), x, names)
    impl, bias = layer.impl, found.bias
    if bias is not None and base.weight is not None:
        base, bias = base._replace(bias=bias if base.bias is None else base.bias + bias), None
    y = run_adapter(x, base, first, impl, "auto", shrunk, layer._own_seed)
    if bias is not None:
        y = y + bias.to(y.dtype)
    for other in found.adapters[1:]:
        y = run_adapter(x, Base(y=y, inplace=True), other, impl, own_seed=layer._own_seed)
    return y
