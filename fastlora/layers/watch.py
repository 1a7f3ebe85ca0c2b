"""Whether adapters' factors are still what they were when they were packed.

Checked once when a block begins: within it, packed factors are dropped by any forward that records
gradients. What this cannot see are writes through ``.data``, which move no version.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import nn

from fastlora.layers.compute import is_hooked

_version = attrgetter("_version")
_training = attrgetter("training")
# Without gradients, backward hooks are of no consequence.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watch:
    """Remembers modules, parameters with their versions, scalings and dropouts of adapters.

    In flat lists, which are compared without a loop in Python: there are thousands of entries.
    """

    def __init__(self) -> None:
        self._holders: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._objects: list[Any] = []
        self._parameters: list[torch.Tensor] = []
        self._stamps: list[list[int]] = [[], []]
        self._scalings: tuple[list[dict[str, Any]], list[str], list[Any]] = ([], [], [])
        self._dropouts: list[nn.Module] = []
        self._hooks: list[dict[Any, Any]] = []
        self._own: list[dict[str, Any]] = []
        self._hooked = False

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
                self._remember(holder, name)
                self._hooked |= is_hooked(module)
                self._hooks += [module.__dict__[kind] for kind in _HOOKS]
                self._own.append(module.__dict__)
                for key in module._parameters:
                    self._remember(module._parameters, key)
            self._remember(dropouts, name)
            if type(dropouts[name]) is nn.Dropout:
                self._dropouts.append(dropouts[name])
            holders, names_of, values = self._scalings
            holders.append(layer.scaling)
            names_of.append(name)
            values.append(layer.scaling[name])

    def _remember(self, holder: dict[str, Any], key: str) -> None:
        value = holder[key]
        self._holders.append(holder)
        self._keys.append(key)
        self._objects.append(value)
        if isinstance(value, torch.Tensor):
            self._parameters.append(value)
            self._stamps[0].append(value._version)
            self._stamps[1].append(value.data_ptr())

    def unchanged(self) -> bool:
        """Whether all of it is as it was, and nothing has been hooked into it."""
        holders, names, scalings = self._scalings
        try:
            return (
                not self._hooked
                and all(map(is_, map(getitem, self._holders, self._keys), self._objects))
                and [*map(_version, self._parameters)] == self._stamps[0]
                and [*map(torch.Tensor.data_ptr, self._parameters)] == self._stamps[1]
                and [*map(getitem, holders, names)] == scalings
                and not any(map(_training, self._dropouts))
                and not any(self._hooks)
                and not any(map(contains, self._own, repeat("forward")))
            )
        except KeyError:  # an adapter was deleted
            return False
