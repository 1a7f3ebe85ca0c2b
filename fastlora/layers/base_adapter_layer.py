"""`BaseAdapterLayer`, the base class of fastlora's layers and of patched PEFT layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastlora.deprecation import RenamedAttribute, without_old_names
from fastlora.layers.adapter_factors import factors_without_calling_modules
from fastlora.layers.base_layers import dense_weight
from fastlora.layers.dora_norms import dora_magnitude_of
from fastlora.layers.group_members import has_shared_input_group, record_compiled_fallback
from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters
from fastlora.layers.quantized_base import clear_base_and_adapter_caches
from fastlora.layers.scalings import Scaling, Scalings
from fastlora.layers.shared_input import clear_group_cache
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.active import active_routings
from fastlora.weights_version import weights_versions


def clear_layer_caches(layer: BaseAdapterLayer) -> None:
    """Clear all of a layer's caches.

    These are the caches that depend on the layer's weights. They include the packed factors that
    the layer's model caches for mixed batches.
    """
    clear_base_and_adapter_caches(layer)
    clear_group_cache(layer)
    weights_versions.invalidate_trainable_weights()  # Open blocks cache results too.
    layer._clear_model_packed_factors()


class BaseAdapterLayer(BaseLinearWithAdapters):
    """Base class of layers with adapters.

    The layers are fastlora's own layers and patched PEFT layers. Switching between training and
    evaluation clears all values cached for the weights. ``scaling`` is always a `Scalings`, with
    tensors on the device of the factors.
    """

    has_shared_input_group = has_shared_input_group
    record_compiled_fallback = record_compiled_fallback
    knows_siblings = RenamedAttribute("has_shared_input_group")
    note_compiled = RenamedAttribute("record_compiled_fallback")

    def __dir__(self) -> list[str]:
        return without_old_names(self, super().__dir__())

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a copied or unpickled layer, also in a process that has created no layers."""
        super().__setstate__(state)
        patch_activation_checkpointing()

    _local_factors = factors_without_calling_modules
    _local_magnitude = dora_magnitude_of

    def _clear_model_packed_factors(self) -> None:
        """Clear the model's packed factors.

        These are the packed factors for mixed batches. They are also cleared in open ``with``
        blocks.
        """
        if self.routing_group is not None:
            self.routing_group.packs.clear()

    def _local_weight(self) -> torch.Tensor:
        """Return this process's shard of the base layer's weight.

        The shard is a dense matrix ``[N, K]``. Without tensor parallelism, the whole weight is
        returned.
        """
        return dense_weight(self.get_base_layer())

    def train(self, mode: bool = True) -> Any:
        """Set the training mode of the layer.

        The layer is returned, as by `nn.Module.train`. If the mode changes, the layer's caches are
        cleared. Open blocks of the layer's model draw the dropout seeds that training needs.
        """
        if mode != self.training:
            clear_layer_caches(self)
        for routing in active_routings() if mode else ():
            if routing.group is self.routing_group:
                routing.draw_missing_seeds()  # Compiled graphs only read the seeds.
        return super().train(mode)

    @property
    def scaling(self) -> dict[str, Scaling]:
        """Dict that maps each adapter name to the adapter's scaling factor."""
        scalings: dict[str, Scaling] = self.__dict__["_scaling"]
        return scalings

    @scaling.setter
    def scaling(self, values: dict[str, Scaling]) -> None:
        changes = "_scaling" in self.__dict__
        self.__dict__["_scaling"] = values if isinstance(values, Scalings) else Scalings(values)
        self._move_scalings_to_factors(values)
        if changes:
            weights_versions.invalidate_trainable_weights()

    def _register_load_hook_that_moves_scalings(self) -> None:
        """Register a load hook that moves the layer's scalings to the right device.

        The hook runs after ``load_state_dict``, which may replace the factors with tensors on
        another device. The hook moves each scaling to the device of its adapter's factors.
        """
        if _move_scalings_after_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_move_scalings_after_load)

    def _remove_load_hook_that_moves_scalings(self) -> None:
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _move_scalings_after_load]:
            del hooks[key]

    def _move_scalings_to_factors(self, names: Iterable[str]) -> None:
        scalings: Scalings = self.__dict__["_scaling"]
        for name in names:
            factor = self._lora_a_weight(name)
            if factor is not None:
                scalings.move_to_factor_device(name, factor)

    def _lora_a_weight(self, name: str) -> torch.Tensor | None:
        """Return the weight of an adapter's lora_A.

        Returns None if the layer lacks the adapter. The weight determines the device of the
        adapter's scaling.
        """
        factors = self._modules.get("lora_A")  # Missing at the very beginning.
        if isinstance(factors, nn.ModuleDict) and name in factors:
            lora_a: Any = factors[name].weight
            return lora_a
        return None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        clear_layer_caches(self)  # Caches must not keep unused memory.
        super()._apply(fn, recurse)
        self._move_scalings_to_factors(self.scaling)
        return self


def _move_scalings_after_load(layer: BaseAdapterLayer, _: object) -> None:
    layer._move_scalings_to_factors(layer.scaling)
