"""Functions that pad an adapter's factors on one layer with zeros to a larger rank.

Padded factors compute the same update. Adapters of different ranks can therefore replace each other
in tensors of one shape, as a compiled graph requires.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fastlora.layers import parts
from fastlora.layers.adapter_init import AdapterInitializer
from fastlora.layers.base_adapter_layer import clear_layer_caches
from fastlora.layers.lora_layer import LoraLayer


@torch.no_grad()
def factors_padded_to_rank(
    layer: LoraLayer, adapter_name: str, rank: int
) -> dict[str, parts.Factor]:
    """Return copies of an adapter's factors, padded with zeros to ``rank``.

    The result is a dict that maps each part to the padded copy of its factor. The layer is not
    changed.
    """
    held = layer._factors_by_name(adapter_name)
    lora_bias = layer._factors(adapter_name)[2] is not None
    with torch.random.fork_rng(devices=[]):  # The drawn values are overwritten below.
        made = layer._create_factors(
            rank, lora_bias, AdapterInitializer(layer, False, 1.0, None, False)
        )
    for part, factor in made.items():
        old = factor_parameters_by_name(held[part])
        factor = made[part] = parts.freeze_and_convert(factor, old["weight"], layer.training)
        for name, tensor in factor_parameters_by_name(factor).items():
            copy_zero_padded(tensor, old[name], layer._num_rank_blocks(part))
            tensor.requires_grad_(old[name].requires_grad)
    return made


def replace_factors(
    layer: LoraLayer, adapter_name: str, new_factors: dict[str, parts.Factor], new_rank: int
) -> None:
    """Replace an adapter's factors on a layer with factors of a new rank.

    The new factors, such as the adapter's factors padded with zeros, have rank ``new_rank``. The
    adapter's scaling does not change, and neither does the scaling that ``set_scale(name, 1.0)``
    restores.
    """
    growth = new_rank / layer.r[adapter_name]
    for part, factor in new_factors.items():
        layer._modules[part][adapter_name] = factor
    layer.r[adapter_name] = new_rank
    layer.lora_alpha[adapter_name] *= (
        math.sqrt(growth) if layer.use_rslora[adapter_name] else growth
    )
    layer._move_scalings_to_factors([adapter_name])
    clear_layer_caches(layer)


def set_scaling_and_alpha(
    layer: LoraLayer, adapter_name: str, scaling: float | torch.Tensor
) -> None:
    """Set an adapter's scaling and the matching lora_alpha.

    The lora_alpha is computed from the scaling and the adapter's current rank.
    """
    own = layer.scaling[adapter_name]
    if isinstance(own, torch.Tensor):
        own.fill_(scaling)
    else:
        layer.scaling[adapter_name] = float(scaling)
    r = layer.r[adapter_name]
    by = math.sqrt(r) if layer.use_rslora[adapter_name] else r
    layer.lora_alpha[adapter_name] = float(scaling) * by


def factor_parameters_by_name(factor: parts.Factor) -> dict[str, nn.Parameter]:
    """Return a dict of a factor's parameters, keyed by name.

    A bare parameter is named ``weight``.
    """
    if isinstance(factor, nn.Parameter):
        return {"weight": factor}
    return dict(factor.named_parameters())


@torch.no_grad()
def copy_zero_padded(target: torch.Tensor, source: torch.Tensor, blocks: int = 1) -> None:
    """Copy ``source`` into ``target``, and fill the rest with zeros.

    Both are factors, and the rank of ``target`` is the same or larger. The rank rows form
    ``blocks`` equal blocks along the first dimension.
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
