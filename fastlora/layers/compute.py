"""From a layer's adapters to one call of `fastlora.functional`.

A layer here is anything with ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling`` keyed by
adapter name: ours, and PEFT's own layers after `fastlora.patch`.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora import functional


def _dropout_p(layer: Any, name: str) -> float:
    """The probability that acts now: 0 in evaluation, and where PEFT put an Identity."""
    dropout = layer.lora_dropout[name]
    return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0


def _scaling_rows(layer: Any, names: list[str], x: torch.Tensor) -> torch.Tensor:
    """Returns the scaling of the adapters' rank rows: ``[1]`` for one adapter, else ``[sum R]``.

    Made once and kept on the layer until a value, a rank, the device or the dtype changes.
    """
    values = [layer.scaling[name] for name in names]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if any(isinstance(value, torch.Tensor) for value in values):  # PEFT's compiled hot swap
        rows = [
            torch.as_tensor(value, dtype=dtype, device=x.device).expand(_rank(layer, name))
            for name, value in zip(names, values, strict=True)
        ]
        return torch.cat(rows)
    ranks = [1] if len(names) == 1 else [_rank(layer, name) for name in names]
    key = (values, ranks, x.device, dtype)
    cached = layer.__dict__.get("_scaling_rows")
    if cached is not None and cached[0] == key:
        return cached[1]
    rows = [
        torch.full((rank,), value, dtype=dtype, device=x.device)
        for rank, value in zip(ranks, values, strict=True)
    ]
    scaling = rows[0] if len(rows) == 1 else torch.cat(rows)
    if type(scaling) is torch.Tensor and not torch.compiler.is_compiling():
        layer.__dict__["_scaling_rows"] = (key, scaling)
    return scaling


def _rank(layer: Any, name: str) -> int:
    return layer.lora_A[name].weight.shape[0]


def _factors(layer: Any, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``lora_a [sum R, K]`` and ``lora_b [N, sum R]``: rank rows side by side."""
    if len(names) == 1:
        return layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    lora_a = torch.cat([layer.lora_A[name].weight for name in names])
    lora_b = torch.cat([layer.lora_B[name].weight for name in names], dim=1)
    return lora_a, lora_b


def _plus_lora_bias(
    layer: Any, names: list[str], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns ``bias + sum of scaling * lora_bias``, ``[N]``."""
    for name in names:
        lora_bias = layer.lora_B[name].bias
        if lora_bias is not None:
            update = lora_bias * layer.scaling[name]
            bias = update if bias is None else bias + update
    return bias


def _groups(layer: Any, names: list[str]) -> list[tuple[list[str], float]]:
    """Splits active adapters into calls: all at once, unless dropout masks x for each alone."""
    dropout = [_dropout_p(layer, name) for name in names]
    if not any(dropout):
        return [(names, 0.0)]
    return [([name], p) for name, p in zip(names, dropout, strict=True)]


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
    bias = _plus_lora_bias(layer, names, bias)
    (first, dropout_p), *others = _groups(layer, names)
    lora_a, lora_b = _factors(layer, first)
    scaling = _scaling_rows(layer, first, x)
    y = functional.linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, impl)
    return _add_groups(layer, y, x, others, impl, inplace=True)


def lora_added_forward(
    layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str], impl: str, inplace: bool
) -> torch.Tensor:
    """Adds the active adapters to the output ``y [..., N]`` of a base layer called as it is."""
    y = _add_groups(layer, y, x, _groups(layer, names), impl, inplace)
    lora_bias = _plus_lora_bias(layer, names, None)
    return y if lora_bias is None else y + lora_bias.to(y.dtype)


def _add_groups(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    groups: list[tuple[list[str], float]],
    impl: str,
    inplace: bool,
) -> torch.Tensor:
    for names, dropout_p in groups:
        lora_a, lora_b = _factors(layer, names)
        scaling = _scaling_rows(layer, names, x)
        y = functional.add(y, x, lora_a, lora_b, scaling, dropout_p, impl, inplace)
        inplace = True
    return y
