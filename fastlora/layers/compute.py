"""From a layer's adapters to one call of `fastlora.functional`.

A layer here is anything with ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling`` keyed by
adapter name: ours, and PEFT's own layers after `fastlora.patch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora import functional, mixed
from fastlora.routing import Routing, RowRouting, layer_seed


class _Branch(NamedTuple):
    """What one call of `fastlora.functional` takes from a layer's adapters.

    Attributes:
        lora_a: ``[R, K]``; several adapters are their rank rows side by side.
        lora_b: ``[N, R]``.
        scaling: No dimensions for one adapter, else ``[R]``.
        lora_bias: ``[N]``, scaled, or None.
        dropout_p: Probability that acts now.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    lora_bias: torch.Tensor | None
    dropout_p: float


def _branch(layer: Any, name: str, x: torch.Tensor) -> _Branch:
    """Returns one adapter's branch."""
    up, dropout, scaling = layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    lora_bias = up.bias
    if lora_bias is not None:
        lora_bias = lora_bias * scaling
    # PEFT has an Identity where there is no dropout.
    dropout_p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    rows = _scaling_tensor(layer, name, scaling, x)
    return _Branch(layer.lora_A[name].weight, up.weight, rows, lora_bias, dropout_p)


def _scaling_tensor(layer: Any, name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns a scaling as a tensor without dimensions, kept on the layer until it changes."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):  # PEFT's compiled hot swap
        return value.to(device=x.device, dtype=dtype).reshape(())
    cache = layer.__dict__.setdefault("_scaling_tensors", {})
    cached = cache.get(name)
    if cached is not None:
        known, tensor = cached
        if known == value and tensor.device == x.device and tensor.dtype == dtype:
            return tensor
    tensor = torch.full((), value, dtype=dtype, device=x.device)
    if type(tensor) is torch.Tensor and not torch.compiler.is_compiling():
        cache[name] = (value, tensor)
    return tensor


def _branches(layer: Any, x: torch.Tensor, names: list[str]) -> list[_Branch]:
    """Returns the active adapters as few branches: one, unless dropout masks x for each alone."""
    branches = [_branch(layer, name, x) for name in names]
    if len(branches) == 1 or any(branch.dropout_p for branch in branches):
        return branches
    biases = [branch.lora_bias for branch in branches if branch.lora_bias is not None]
    return [
        _Branch(
            torch.cat([branch.lora_a for branch in branches]),
            torch.cat([branch.lora_b for branch in branches], dim=1),
            torch.cat([b.scaling.expand(b.lora_a.shape[0]) for b in branches]),
            sum(biases[1:], biases[0]) if biases else None,
            0.0,
        )
    ]


def lora_forward(
    layer: Any,
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
    first, *others = _branches(layer, x, names)
    lora_a, lora_b, scaling, lora_bias, dropout_p = first
    if lora_bias is not None:
        bias = lora_bias if bias is None else bias + lora_bias
    y = functional.linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, impl)
    return _add(y, x, others, impl, inplace=True) if others else y


def lora_added_forward(
    layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str], impl: str, inplace: bool
) -> torch.Tensor:
    """Adds the active adapters to the output ``y [..., N]`` of a base layer called as it is."""
    return _add(y, x, _branches(layer, x, names), impl, inplace)


def _add(
    y: torch.Tensor, x: torch.Tensor, branches: list[_Branch], impl: str, inplace: bool
) -> torch.Tensor:
    for lora_a, lora_b, scaling, lora_bias, dropout_p in branches:
        y = functional.add(y, x, lora_a, lora_b, scaling, dropout_p, impl, inplace)
        if lora_bias is not None:
            y = y + lora_bias.to(y.dtype)
        inplace = True
    return y


def mixed_forward(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
) -> torch.Tensor:
    """Runs a plain linear base layer, each row with its own adapter.

    Args:
        layer: Holds the adapters; rows whose adapter it lacks are base rows.
        x: ``[..., K]``.
        weight: Base weight ``[N, K]``.
        bias: Base bias ``[N]`` or None.
        routing: The batch's.
        projection: The layer's number in its model, which makes its dropout its own.
    """
    x = functional.autocast(x)
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    shares, factors = _shares(layer, x, routing, rows, projection)
    if _wants_grad(x, weight, bias, *factors):
        return mixed.MixedLoraLinear.apply(x, weight, bias, rows, shares, *factors)
    return mixed.forward_linear(x, weight, bias, rows, shares, factors)[0]


def mixed_added_forward(
    layer: Any, y: torch.Tensor, x: torch.Tensor, routing: Routing, projection: int
) -> torch.Tensor:
    """Adds each row's own adapter to the output ``y`` of a base layer called as it is."""
    x = functional.autocast(x)
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    shares, factors = _shares(layer, x, routing, rows, projection)
    if not shares:
        return y
    if _wants_grad(y, x, *factors):
        return mixed.MixedLoraAdd.apply(y, x, None, rows, shares, *factors)
    return mixed.forward_add(y, x, rows, shares, factors)[0]


def _shares(
    layer: Any, x: torch.Tensor, routing: Routing, rows: RowRouting, projection: int
) -> tuple[list[mixed.Share], tuple[torch.Tensor, ...]]:
    """Returns what each adapter with rows here contributes, and all their factors in turn."""
    shares: list[mixed.Share] = []
    factors: list[torch.Tensor] = []
    for segment in rows.segments:
        name = routing.names[segment.slot]
        if name not in layer.lora_A:
            continue
        up, dropout = layer.lora_B[name], layer.lora_dropout[name]
        dropout_p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        seed = layer_seed(routing.seeds[segment.slot], projection) if dropout_p else None
        scaling = _scaling_tensor(layer, name, layer.scaling[name], x)
        shares.append(mixed.Share(segment, scaling, seed, dropout_p))
        factors += [layer.lora_A[name].weight, up.weight, up.bias]
    return shares, tuple(factors)


def _wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
