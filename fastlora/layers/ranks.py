"""Functions that pad an adapter's factors on one layer with zeros to a larger rank.

Padded factors compute the same update. Adapters of different ranks can therefore replace each other
in tensors of one shape, as a compiled graph requires.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastlora.layers import parts
from fastlora.layers.base import LoraLayer
from fastlora.layers.common import forget_kept
from fastlora.layers.starting import Starter


@torch.no_grad()
def resized(layer: LoraLayer, adapter_name: str, rank: int) -> dict[str, parts.Factor]:
    """Return a dict that maps each part to an adapter's factor, padded to ``rank``.

    The layer is not changed.
    """
    held = layer._held_parts(adapter_name)
    lora_bias = layer._factors(adapter_name)[2] is not None
    with torch.random.fork_rng(devices=[]):  # The drawn values are overwritten below.
        made = layer._new_factors(rank, lora_bias, Starter(layer, False, 1.0, None, False))
    for part, factor in made.items():
        old = tensors_of(held[part])
        factor = made[part] = parts.frozen_like(factor, old["weight"], layer.training)
        for name, tensor in tensors_of(factor).items():
            put_rows(tensor, old[name], blocks_of(layer, part))
            tensor.requires_grad_(old[name].requires_grad)
    return made


def set_factors(
    layer: LoraLayer, adapter_name: str, factors: dict[str, parts.Factor], rank: int
) -> None:
    """Replace an adapter's factors by factors of rank ``rank``, without changing its scaling."""
    for part, factor in factors.items():
        layer._modules[part][adapter_name] = factor
    layer.r[adapter_name] = rank
    set_scaling(layer, adapter_name, layer.scaling[adapter_name])
    layer._fit_scalings([adapter_name])
    forget_kept(layer)


def set_scaling(layer: LoraLayer, adapter_name: str, scaling: float | torch.Tensor) -> None:
    """Set an adapter's scaling, and the corresponding lora_alpha for the adapter's rank."""
    own = layer.scaling[adapter_name]
    if isinstance(own, torch.Tensor):
        own.fill_(scaling)
    else:
        layer.scaling[adapter_name] = float(scaling)
    r = layer.r[adapter_name]
    by = math.sqrt(r) if layer.use_rslora[adapter_name] else r
    layer.lora_alpha[adapter_name] = float(scaling) * by


def tensors_of(factor: parts.Factor) -> dict[str, nn.Parameter]:
    """Return a dict that maps names to a factor's parameters; a bare parameter is ``weight``."""
    if isinstance(factor, nn.Parameter):
        return {"weight": factor}
    return dict(factor.named_parameters())


def blocks_of(layer: LoraLayer, part: str) -> int:
    """Return the number of blocks into which a factor's rank rows are divided.

    It is the number of groups for lora_A of a convolution, and 1 otherwise.
    """
    base: Any = layer.get_base_layer()
    return int(getattr(base, "groups", 1)) if part == "lora_A" else 1


@torch.no_grad()
def put_rows(target: torch.Tensor, source: torch.Tensor, blocks: int = 1) -> None:
    """Copy a factor into a tensor of the same or a larger rank, and fill the rest with zeros.

    The rank rows form ``blocks`` equal blocks along the first dimension.
    """
    if target.shape == source.shape:
        target.copy_(source)
        return
    target.zero_()
    if blocks > 1:
        own = source.unflatten(0, (blocks, -1)).to(target.device)
        target.unflatten(0, (blocks, -1))[:, : own.shape[1]] = own
    else:
        target[tuple(map(slice, source.shape))] = source.to(target.device)
