"""Whether parameters of adapters, and what is hooked into them, are as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, contains, eq, getitem, is_
from typing import Any

import torch
from torch import nn

_version = attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr
_training = attrgetter("training")


class Watch:
    """Remembers modules, parameters with their versions, scalings and dropouts of adapters.

    It is asked once when a block begins. It does not see writes that move no version: for these
    there are marks (`fastlora.weight_marks`), which are checked within a block too.

    It keeps the memory of the factors, so that no other tensor can get their addresses, and an
    address and a version identify the contents. A `Stamp` keeps no memory, but takes longer to
    compare. Lists are flat, and compared without a loop in Python: 64 adapters on SmolLM2 have
    13,440 pairs of factors, and every block pays for the look at each of them.
    """

    def __init__(self) -> None:
        self._holders: list[Mapping[str, object]] = []
        self._keys: list[str] = []
        self._objects: list[Any] = []
        self._parameters: list[torch.Tensor] = []
        self._states: list[tuple[int, int]] = []
        self._memory: list[torch.UntypedStorage] = []
        self._dropouts: list[nn.Module] = []
        self._hooks: list[dict[Any, Any]] = []
        self._own: list[dict[str, Any]] = []
        self._hooked = self._untold = False

    def add(self, layer: nn.Module, scaling: Mapping[str, object], names: Sequence[str]) -> None:
        """Remembers those of the adapters that a layer has, with its scalings by name."""
        modules: dict[str, Any] = layer._modules
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        present = [name for name in names if name in downs]
        for name in present:
            for table in (downs, ups, dropouts, scaling):
                self._remember(table, name)
            for module in (downs[name], ups[name]):
                own = module.__dict__
                # Later ones are of no consequence without gradients.
                self._hooked |= bool(own["_backward_hooks"] or own["_backward_pre_hooks"])
                self._hooks += [own["_forward_hooks"], own["_forward_pre_hooks"]]
                self._own.append(own)
                for key in module._parameters:
                    self._remember(module._parameters, key)
            if type(dropouts[name]) is nn.Dropout:
                self._dropouts.append(dropouts[name])

    def _remember(self, holder: Mapping[str, object], key: str) -> None:
        value = holder[key]
        self._holders.append(holder)
        self._keys.append(key)
        self._objects.append(value)
        if isinstance(value, torch.Tensor) and value.is_inference():
            self._untold = True
        elif isinstance(value, torch.Tensor):
            self._parameters.append(value)
            self._states.append((value._version, value.data_ptr()))
            self._memory.append(value.untyped_storage())

    def unchanged(self) -> bool:
        """Whether all of it is as it was, and nothing has been hooked into it."""
        # One pass for both: a tensor once read is still in the processor's cache.
        tensors = self._parameters
        states = zip(map(_version, tensors), map(_data_ptr, tensors), strict=True)
        try:
            return (
                not self._hooked
                and not self._untold
                and all(map(is_, map(getitem, self._holders, self._keys), self._objects))
                and all(map(eq, states, self._states))
                and not any(map(_training, self._dropouts))
                and not any(self._hooks)
                and not any(map(contains, self._own, repeat("forward")))
            )
        except KeyError:  # an adapter was deleted
            return False
