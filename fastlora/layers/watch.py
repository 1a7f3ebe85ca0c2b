"""Whether adapters' factors are still what they were when they were packed.

Checked once when a block begins: within it, packed factors are dropped by any forward that records
gradients. What this cannot see are writes through ``.data``, which move no version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.layers.compute import is_hooked


class Watch:
    """Remembers modules, parameters with their versions, scalings and dropouts of adapters."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict[str, Any], str]] = []
        self._objects: list[Any] = []
        self._parameters: list[torch.Tensor] = []
        self._stamps: list[tuple[int, int]] = []
        self._scalings: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[nn.Module] = []
        self._dropouts: list[nn.Module] = []

    def add(self, layer: Any, names: Sequence[str]) -> None:
        """Remembers those of the adapters that a layer has."""
        modules = layer._modules
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        for name in names:
            if name not in downs:
                continue
            for holder in (downs, ups):
                module = holder[name]
                self._modules.append(module)
                self._remember(holder, name)
                for key in module._parameters:
                    self._remember(module._parameters, key)
            self._remember(dropouts, name)
            self._scalings.append((layer.scaling, name, layer.scaling[name]))
            self._dropouts.append(dropouts[name])

    def _remember(self, holder: dict[str, Any], key: str) -> None:
        value = holder[key]
        self._entries.append((holder, key))
        self._objects.append(value)
        if isinstance(value, torch.Tensor):
            self._parameters.append(value)
            self._stamps.append(_stamp(value))

    def unchanged(self) -> bool:
        """Whether all of it is as it was, and nothing has been hooked into it."""
        return (
            [id(holder.get(key)) for holder, key in self._entries] == [*map(id, self._objects)]
            and [_stamp(parameter) for parameter in self._parameters] == self._stamps
            and all(holder.get(name) == value for holder, name, value in self._scalings)
            and not any(d.training and type(d) is nn.Dropout for d in self._dropouts)
            and not any(is_hooked(module) for module in self._modules)
        )


def _stamp(parameter: torch.Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()
