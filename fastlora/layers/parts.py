"""One adapter's tensors on one layer: made, widened, and what files call them.

A factor is a module with a weight (`nn.Linear`, a convolution, DoRA's magnitude), or a parameter
where PEFT has one (embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Factor = nn.Module | nn.Parameter


class DoraMagnitude(nn.Module):
    """One adapter's magnitude: ``weight [N]``, under the name that PEFT gives it.

    Args:
        magnitude: Its first value.
    """

    def __init__(self, magnitude: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)


def frozen_like(factor: Factor, reference: torch.Tensor | None, training: bool) -> Factor:
    """Returns a new factor frozen, with a tensor's device and dtype."""
    if isinstance(factor, nn.Module):
        if reference is not None:
            factor.to(device=reference.device, dtype=reference.dtype)
        return factor.train(training).requires_grad_(False)
    if reference is not None:
        factor = nn.Parameter(factor.detach().to(reference.device, reference.dtype))
    factor.requires_grad_(False)
    return factor


def widened(factor: Factor) -> Factor:
    """Returns a factor in fp32 where it has fewer bits; a module is changed in place."""
    if isinstance(factor, nn.Parameter):
        if factor.itemsize >= torch.float32.itemsize:
            return factor
        return nn.Parameter(factor.detach().float(), factor.requires_grad)
    for parameter in factor.parameters():
        if parameter.itemsize >= torch.float32.itemsize:
            return factor
    return factor.to(torch.float32)


def file_names(held: Mapping[str, Factor], adapter_name: str) -> dict[str, str]:
    """Returns what a file calls an adapter's tensors, and their names in ``state_dict()``.

    Both below the layer's own name: ``lora_A.weight``, and ``lora_A.default.weight``. ``held`` has
    its factors and magnitude by the part that they belong to.
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
