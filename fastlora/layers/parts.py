"""Helpers for one adapter's factors on one layer: new factors, conversion, and file names.

A factor is a module with a weight (an `nn.Linear`, a convolution, a DoRA magnitude), or a parameter
where PEFT has one (embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Factor = nn.Module | nn.Parameter


class DoraMagnitude(nn.Module):
    """DoRA magnitude of one adapter in one layer.

    The magnitude is the parameter ``weight [N]`` of this module, as in PEFT.

    Args:
        magnitude: Initial value.
    """

    def __init__(self, magnitude: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)


def freeze_and_convert(
    factor: Factor, reference: torch.Tensor | None, module_training_mode: bool
) -> Factor:
    """Return a factor, frozen and converted to the device and dtype of a reference tensor.

    The factor is not converted if ``reference`` is None. A factor that is a module is changed in
    place, and its training mode is set to ``module_training_mode``.
    """
    if isinstance(factor, nn.Module):
        if reference is not None:
            factor.to(device=reference.device, dtype=reference.dtype)
        return factor.train(module_training_mode).requires_grad_(False)
    if reference is not None:
        factor = nn.Parameter(factor.detach().to(reference.device, reference.dtype))
    factor.requires_grad_(False)
    return factor


def upcast_to_fp32(factor: Factor) -> Factor:
    """Convert a factor to fp32, and return it.

    A factor whose dtype is not narrower than fp32 is returned unchanged. A module is converted in
    place.
    """
    if isinstance(factor, nn.Parameter):
        if factor.itemsize >= torch.float32.itemsize:
            return factor
        return nn.Parameter(factor.detach().float(), factor.requires_grad)
    for parameter in factor.parameters():
        if parameter.itemsize >= torch.float32.itemsize:
            return factor
    return factor.to(torch.float32)


def file_to_state_dict_names(
    factors_by_part: Mapping[str, Factor], adapter_name: str
) -> dict[str, str]:
    """Return a dict that maps names of tensors in an adapter file to their names in a state dict.

    The tensors are those of an adapter in one layer. Both names of a tensor are relative to the
    layer: ``lora_A.weight`` maps to ``lora_A.default.weight``. ``factors_by_part`` maps each part,
    such as ``"lora_A"``, to the adapter's factor.
    """
    names: dict[str, str] = {}
    for part, factor in factors_by_part.items():
        own = f"{part}.{adapter_name}"
        if isinstance(factor, nn.Parameter):
            names[part] = own
        elif isinstance(factor, DoraMagnitude):
            names[part] = f"{own}.weight"
        else:
            names[f"{part}.weight"] = f"{own}.weight"
            if getattr(factor, "bias", None) is not None:
                names[f"{part}.bias"] = f"{own}.bias"
    return names
