"""Detection of changes to adapters' parameters, and of hooks on their modules."""

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


class AdapterChangeDetector:
    """Detects whether a model's adapters have changed since their state was recorded.

    The recorded state is a snapshot of modules, parameters, parameter versions, scalings, and
    dropouts. The snapshot is checked once per block. The check does not detect writes that do not
    change a tensor's version. Weights versions (`fastlora.weights_version`) cover these writes, and
    are checked within a block too.

    The snapshot keeps the factors' memory alive, so no other tensor can get the same address. An
    address and a version then identify the contents. A `TensorStamp` keeps no memory alive, but
    takes longer to compare. The lists are flat and are compared without a Python loop, because
    every block checks each entry: 64 adapters on SmolLM2 have 13,440 pairs of factors.
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
        # Recorded adapters that a layer lacks: its adapters, and the missing name.
        self._tables: list[dict[str, Any]] = []
        self._missing: list[str] = []
        self._hooked = self._has_inference_tensors = False

    def record_adapters(
        self, layer: nn.Module, scaling: Mapping[str, object], names: Sequence[str]
    ) -> None:
        """Record the current state of a layer's adapters, so that later changes can be detected.

        The state is added to the snapshot. The state includes the factors, the dropouts, and the
        scalings of the named adapters.

        Args:
            layer: The layer, which may lack some of the adapters.
            scaling: Maps the name of each adapter to its scaling in the layer.
            names: Names of the adapters to record.
        """
        modules: dict[str, Any] = layer._modules
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        for part in ("lora_A", "lora_B", "lora_dropout"):
            self._remember(modules, part)
        present = [name for name in names if name in downs]
        missing = [name for name in names if name not in downs]
        self._tables += [downs] * len(missing)
        self._missing += missing
        for name in present:
            for table in (downs, ups, dropouts, scaling):
                self._remember(table, name)
            for module in (downs[name], ups[name]):
                own = module.__dict__
                # Backward hooks that are added later have no effect without gradients.
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
            self._has_inference_tensors = True
        elif isinstance(value, torch.Tensor):
            self._parameters.append(value)
            self._states.append((value._version, value.data_ptr()))
            self._memory.append(value.untyped_storage())

    def adapters_are_unchanged(self) -> bool:
        """Return whether the adapters have not changed since they were recorded.

        The current state of the adapters is compared with the state that was recorded. A new
        forward hook on a module also counts as a change.
        """
        # One pass reads both: a tensor that was just read is still in the processor's cache.
        tensors = self._parameters
        states = zip(map(_version, tensors), map(_data_ptr, tensors), strict=True)
        try:
            return (
                not self._hooked
                and not self._has_inference_tensors
                and all(map(is_, map(getitem, self._holders, self._keys), self._objects))
                and all(map(eq, states, self._states))
                and not any(map(contains, self._tables, self._missing))
                and not any(map(_training, self._dropouts))
                and not any(self._hooks)
                and not any(map(contains, self._own, repeat("forward")))
            )
        except KeyError:  # An adapter was deleted.
            return False
