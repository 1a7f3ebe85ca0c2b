"""One adapter's tensors on one layer: creation, conversion to fp32, and names in files.

A factor is a module with a weight (an `nn.Linear`, a convolution, a DoRA magnitude), or a parameter
where PEFT has one (embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Factor = nn.Module | nn.Parameter


class DoraMagnitude(nn.Module):
    """One adapter's DoRA magnitude: ``weight [N]``, under the name that PEFT gives it.

    Args:
        magnitude: Initial value.
    """

    def __init__(self, magnitude: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)


def frozen_like(factor: Factor, reference: torch.Tensor | None, training: bool) -> Factor:
    """Return a new factor, frozen, with the device and dtype of ``reference``."""
    if isinstance(factor, nn.Module):
        if reference is not None:
            factor.to(device=reference.device, dtype=reference.dtype)
        return factor.train(training).requires_grad_(False)
    if reference is not None:
        factor = nn.Parameter(factor.detach().to(reference.device, reference.dtype))
    factor.requires_grad_(False)
    return factor


def widened(factor: Factor) -> Factor:
    """Return a factor in fp32 if it has fewer than 32 bits, changing a module in place."""
    if isinstance(factor, nn.Parameter):
        if factor.itemsize >= torch.float32.itemsize:
            return factor
        return nn.Parameter(factor.detach().float(), factor.requires_grad)
    for parameter in factor.parameters():
        if parameter.itemsize >= torch.float32.itemsize:
            return factor
    return factor.to(torch.float32)


def file_names(held: Mapping[str, Factor], adapter_name: str) -> dict[str, str]:
    """Map the names of an adapter's tensors in files to their names in ``state_dict()``.

    Both names are relative to the layer: ``lora_A.weight`` maps to ``lora_A.default.weight``.
    ``held`` contains the adapter's factors and magnitude by part.
    """
    names: dict[str, str] = {}
    for part, factor in held.items():
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
