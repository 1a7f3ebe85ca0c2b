"""A subclass of PEFT's LoRA tuner that runs with fastlora, and the patching of whole models.

`fastlora.patch` replaces the classes of PEFT's objects with subclasses. The objects retain their
parameters, hooks, and state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraModel as PeftLoraModel
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fastlora.integrations.peft_layers import (
    FusedForwardMixin,
    check_can_unpatch,
    copy_dunder_name_from_peft_base,
    has_unsupported_variant,
    patch_layer,
    unpatch_layer,
    with_signature_of,
)
from fastlora.integrations.peft_router import (
    PatchedModelRouter,
    remove_router,
    router_of_base_model,
    search_lock,
)
from fastlora.layers.adapter_factors import ModelAdapterSource
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.quantized import prevent_bitsandbytes_repacking
from fastlora.ops.seeds import draw_seeds
from fastlora.routing.active import activate_routing as routing_in_force
from fastlora.routing.active import check_batch_matches_ids, discard_unused_results
from fastlora.routing.ids import BASE, names_and_slots
from fastlora.routing.routing import Routing
from fastlora.validation import UnsupportedLayerError


class FastPeftLoraModel(PeftLoraModel):
    """PEFT's LoRA model (``LoraModel``) with fastlora's LoRA layers.

    This class is a subclass of ``LoraModel``, which is PEFT's LoRA tuner. PEFT creates each new
    LoRA layer, and `patch_layer` then replaces the class of the layer with fastlora's subclass, if
    there is one. The model supports mixed batches.
    """

    @staticmethod
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        module = PeftLoraModel._create_new_module(*args, **kwargs)
        patch_layer(module)
        return module

    @with_signature_of(PeftLoraModel.inject_adapter)
    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter into the model.

        PEFT injects the adapter. `_create_new_module` creates each new layer with PEFT, and patches
        the layer. The list of the model's LoRA layers is then updated.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._update_routed_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the model.

        PEFT deletes the adapter. The list of the model's LoRA layers is then updated.

        Raises:
            AdapterStateError: A `fastlora.adapters` block is open for the model.
        """
        self._check_no_open_block("delete_adapter")
        super().delete_adapter(adapter_name)
        self._update_routed_layers()

    @with_signature_of(PeftLoraModel.merge_adapter)
    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the base weights."""
        self._check_no_open_block("merge_adapter")
        super().merge_adapter(*args, **kwargs)

    @with_signature_of(PeftLoraModel.merge_and_unload)
    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge adapters into the base weights, and return the base model without LoRA layers."""
        self._check_no_open_block("merge_and_unload")
        model = super().merge_and_unload(*args, **kwargs)
        remove_router(model)
        return model

    def unload(self) -> nn.Module:
        """Unload the adapters, and return the base model.

        The LoRA layers are removed from the model. The adapters are not merged into the base
        weights.
        """
        self._check_no_open_block("unload")
        model = super().unload()
        remove_router(model)
        return model

    def _check_no_open_block(self, operation: str) -> None:
        """Raise `AdapterStateError` if a `fastlora.adapters` block is open for the model.

        In such a block, rows are routed to adapters. A running call of the model with
        ``adapter_names`` counts as a block if fastlora routes the batch. ``operation`` is the name
        of the called method, for the error message.

        `disable_adapter_layers` does not call this method, because PEFT's context manager
        `disable_adapter` may call `disable_adapter_layers` inside a block.
        """
        router = router_of_base_model(self.model)
        if router is not None:
            router.group.check_no_open_blocks(operation)

    def _update_routed_layers(self) -> None:
        """Update the list of the model's routed layers.

        A routed layer is a LoRA layer that selects an adapter for each row of a mixed batch. The
        model's router keeps the list. If the model has no router yet, this method does nothing.
        """
        router = router_of_base_model(self.model)
        if router is not None:
            router.update_routed_layers(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the patched model's forward pass, with fastlora if possible and otherwise with PEFT.

        Each patched LoRA layer of the PEFT model runs with fastlora if possible, or else with
        PEFT's ``forward`` method. Returns the model's output, as PEFT's method does. If a
        `fastlora.adapters` block is active or fastlora routes ``adapter_names``, the batch size
        must match the number of adapter ids.
        """
        self._check_batch(args, kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            router = router_of_base_model(self.model)
            if router is not None:
                discard_unused_results(router.group)

    def _check_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        router = router_of_base_model(self.model)
        if router is not None and router.routed_layers:
            check_batch_matches_ids(router.group, args, kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Context manager that enables the adapters in ``adapter_names`` for the rows of a batch.

        This method overrides PEFT's method of the same name. During the ``with`` block, fastlora
        routes each row to the adapter that ``adapter_names`` assigns to the row. The routing is
        computed once for the whole model, whereas PEFT assigns the rows to adapters at every layer.
        PEFT's own method is used instead if there are no ``adapter_names``, if the model is in
        training mode, or if fastlora cannot route the batch.
        """
        names = kwargs.get("adapter_names")
        if names is None or self.training or kwargs.get("alora_offsets") is not None:
            routed = None
        else:
            routed = self._router_if_supported(names)
        if routed is None:
            self._check_batch(args, kwargs)
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        slots = names_and_slots(tuple(self.peft_config), list(names or ()))
        seeds, source = draw_seeds(slots[0], None, draw=False), ModelAdapterSource(slots[0])
        undrawn = [*range(len(seeds))]
        layers = routed.routed_layers
        with routing_in_force(
            Routing(routed.group, *slots, seeds, source, layers, undrawn=undrawn)
        ):
            check_batch_matches_ids(routed.group, args, kwargs)
            yield

    def _router_if_supported(self, names: Any) -> PatchedModelRouter | None:
        """Return the router for a batch with the given adapter names.

        The result is None if fastlora does not support the batch. PEFT then processes the batch or
        raises an error.
        """
        wanted = {name for name in names if name != BASE}
        if not wanted <= set(self.peft_config):
            return None
        try:
            found = patched_model_router(self)
        except UnsupportedLayerError:
            return None
        for layer in () if found is None else found.routed_layers:
            if layer.merged or any(has_unsupported_variant(layer, name) for name in wanted):
                return None
        return found


copy_dunder_name_from_peft_base(FastPeftLoraModel)


def patched_model_router(model: nn.Module) -> PatchedModelRouter | None:
    """Return the router of a patched PEFT model, or None if the model is not patched.

    The router is a `PatchedModelRouter`, which routes the rows of mixed batches to adapters.

    Raises:
        UnsupportedLayerError: A module with adapters does not support mixed batches.
        AdapterStateError: A `fastlora.adapters` block is open for another model that shares
            layers with this one.
    """
    root, outside = _find_root(model)
    if root is None or getattr(root, "peft_config", None) is None:
        return None
    tuner = root if isinstance(root, FastPeftLoraModel) else None
    base: nn.Module = root if tuner is None else tuner.model
    with search_lock:
        router = router_of_base_model(base)
        if router is None or router.model is not base:
            router = vars(base)["_fastlora_router"] = PatchedModelRouter(base)
        if tuner is None:
            router.install_batch_check()
        router.find_routed_layers(root, search=tuner is None)
    if not router.routed_layers:
        return None  # The adapters were unloaded.
    adapted = [m for m in outside if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    inside = {*map(id, base.modules())} if adapted else set()
    if any(id(module) not in inside for module in adapted):
        raise UnsupportedLayerError(
            f"the {type(model).__name__} has adapted layers outside its {type(base).__name__}; "
            "call fastlora.adapters() with the submodule that has the named adapters"
        )
    return router


def _find_root(model: nn.Module) -> tuple[nn.Module | None, list[nn.Module]]:
    """Find the root PEFT model inside a model, and list the modules outside the root.

    The root is the first module that is a patched tuner, or into which PEFT injected LoRA layers
    that are not inside a tuner. The root can be the model itself. The result is a tuple (root,
    modules). If there is no such module, the root is None. The list contains the modules that the
    search visits outside the root.
    """
    root: nn.Module | None = None
    outside, seen, waiting = [], {id(model)}, [model]
    while waiting:  # Modules of the root are not visited, because it contains most of them.
        module = waiting.pop()
        if root is None and (isinstance(module, FastPeftLoraModel) or _is_injected_root(module)):
            root = module
            continue
        outside.append(module)
        for child in reversed([*module._modules.values()]):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return root, outside


def _is_injected_root(model: nn.Module) -> bool:
    """Return whether PEFT injected LoRA layers directly into a model.

    The result is True only if the model has a ``peft_config`` and at least one patched LoRA layer
    is outside of the model's tuners. The result is False for a `PeftModel`.
    """
    if isinstance(model, PeftModel):
        return False  # It reads the ``peft_config`` of its tuner.
    # Wrappers that forward attributes do not count, but a class may define a property.
    is_property = isinstance(getattr(type(model), "peft_config", None), property)
    configs = getattr(model, "peft_config", None) if is_property else vars(model).get("peft_config")
    if not isinstance(configs, dict) or not configs:
        return False
    if not all(isinstance(config, PeftConfig) for config in configs.values()):
        return False
    layers, tuners, waiting = [], [], [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, FastPeftLoraModel):
            tuners.append(module)
            continue
        if isinstance(module, FusedForwardMixin):
            layers.append(module)
        waiting += [child for child in module._modules.values() if child is not None]
    inside = {id(inner) for tuner in tuners for inner in tuner.modules()}
    return any(id(layer) not in inside for layer in layers)


def patch_model(model: nn.Module) -> int:
    """Patch a PEFT model's LoRA layers to run with fastlora, and return the number of LoRA layers.

    The model is patched in place, including its tuners. A LoRA layer of a class that fastlora does
    not patch remains unchanged, but is also counted.
    """
    seen = 0
    for module in model.modules():
        if isinstance(module, PeftLoraLayer) and not isinstance(module, LoraLayer):
            seen += 1
            patch_layer(module)
        elif type(module) is PeftLoraModel:
            module.__class__ = FastPeftLoraModel
    for module in model.modules():
        router = router_of_base_model(module)
        if router is not None:
            router.update_routed_layers(module)  # blocks may be open
    if any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name):
        prevent_bitsandbytes_repacking(model)
    return seen


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model` on a model.

    All patched layers and tuners get back their original classes, and thus PEFT's forward methods.
    """
    for module in model.modules():
        check_can_unpatch(module)
    for module in model.modules():
        unpatch_layer(module)
        remove_router(module)
        if type(module) is FastPeftLoraModel:
            module.__class__ = PeftLoraModel  # type: ignore[assignment]  # as above
