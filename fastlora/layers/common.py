"""`CommonLayer`, the base class of fastlora's linear layers and of patched PEFT layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastlora.layers.bases import dense_weight
from fastlora.layers.coded_base import forget_weights
from fastlora.layers.factors import factors_of
from fastlora.layers.group_members import knows_siblings, note_compiled
from fastlora.layers.layer import AdaptedLayer
from fastlora.layers.norms import magnitude_of
from fastlora.layers.scalings import Scaling, Scalings
from fastlora.layers.shared_input import forget_group
from fastlora.weight_marks import marks


def forget_kept(layer: CommonLayer) -> None:
    """Clear the caches of a layer's weights, and of its model's adapters in mixed batches."""
    forget_weights(layer)
    forget_group(layer)
    marks.end_trained()  # Open blocks cache results too.
    layer._forget_packed()


class CommonLayer(AdaptedLayer):
    """Base class of linears with adapters: fastlora's layers and PEFT layers that are patched.

    Switching between training and evaluation clears all values cached for the weights. ``scaling``
    is always a `Scalings`, with tensors on the device of the factors.
    """

    knows_siblings = knows_siblings
    note_compiled = note_compiled
    _own_factors = factors_of
    _own_magnitude = magnitude_of

    def _forget_packed(self) -> None:
        """Clear the model's packed factors for mixed batches, because factors may change.

        Open blocks are included.
        """
        if self.routed_by is not None:
            self.routed_by.packs.clear()

    def _own_weight(self) -> torch.Tensor:
        """Return the base weight as a dense matrix, ``[N, K]``."""
        return dense_weight(self.get_base_layer())

    def train(self, mode: bool = True) -> Any:
        """Set training mode as `nn.Module.train` does, and clear caches if the mode changes."""
        if mode != self.training:
            forget_kept(self)
        return super().train(mode)

    @property
    def scaling(self) -> dict[str, Scaling]:
        """Maps an adapter name to the number that multiplies its update."""
        scalings: dict[str, Scaling] = self.__dict__["_scaling"]
        return scalings

    @scaling.setter
    def scaling(self, values: dict[str, Scaling]) -> None:
        self.__dict__["_scaling"] = values if isinstance(values, Scalings) else Scalings(values)
        self._fit_scalings(values)

    def _watch_loads(self) -> None:
        """Register a hook that refits the scalings after ``load_state_dict`` replaces factors."""
        if _fit_loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_fit_loaded)

    def _unwatch_loads(self) -> None:
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _fit_loaded]:
            del hooks[key]

    def _fit_scalings(self, names: Iterable[str]) -> None:
        scalings: Scalings = self.__dict__["_scaling"]
        for name in names:
            factor = self._first_factor(name)
            if factor is not None:
                scalings.fit(name, factor)

    def _first_factor(self, name: str) -> torch.Tensor | None:
        """Return an adapter's lora_A weight, or None if there is none.

        It determines the device of the adapter's scaling.
        """
        factors = self._modules.get("lora_A")  # Missing at the very beginning.
        if isinstance(factors, nn.ModuleDict) and name in factors:
            lora_a: Any = factors[name].weight
            return lora_a
        return None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        forget_kept(self)  # Caches must not keep unused memory.
        super()._apply(fn, recurse)
        self._fit_scalings(self.scaling)
        return self


def _fit_loaded(layer: CommonLayer, _: object) -> None:
    layer._fit_scalings(layer.scaling)
