"""Subclasses of PEFT's LoRA layers and tuner that compute their outputs with fastlora.

`fastlora.patch` replaces the classes of PEFT's objects with these subclasses. The objects retain
their parameters, hooks, and state. The subclasses override ``forward`` and the methods that must
clear caches or check for open blocks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraModel as PeftLoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters, ParameterLoraLayer
from fastlora.layers.adapter_factors import ParameterSource
from fastlora.layers.base_adapter_layer import BaseAdapterLayer, clear_layer_caches
from fastlora.layers.base_layers import fallback_reason_not_plain_linear
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.fallback_reasons import FusionStatus, fusion_status
from fastlora.layers.linear_forward import create_call, forward
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.quantized import (
    BaseQuantizedWeight,
    peft_quantized_layers,
    prevent_bitsandbytes_repacking,
    quantized_weight_of,
)
from fastlora.layers.quantized_base import (
    call_base_layer,
    clear_base_and_adapter_caches,
    fallback_reason_base_called,
    quantized_base_for_kernels,
    quantized_base_of_layer,
    to_base_output_dtype,
)
from fastlora.model.stacked_experts import experts_layer_class
from fastlora.ops.execution_mode import is_being_compiled
from fastlora.ops.factors import Base
from fastlora.ops.seeds import draw_seeds
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.active import activate_routing as routing_in_force
from fastlora.routing.active import (
    check_batch_matches_ids,
    discard_unused_results,
    skip_batch_size_check,
)
from fastlora.routing.block import routing_from_parameters, sample_routings_from_parameters
from fastlora.routing.ids import BASE, names_and_slots
from fastlora.routing.routing import RoutedLayerGroup, Routing, add_to_group
from fastlora.validation import AdapterNotFoundError, AdapterStateError, UnsupportedLayerError


class _FusedForwardMixin(BaseAdapterLayer):
    """Mixin that gives PEFT's LoRA layers fastlora's fused forward pass.

    It implements the forward pass of every patched layer. In cases that fastlora does not support,
    it calls the forward method of PEFT's layer. In each patched class, this mixin precedes the PEFT
    layer class in the list of base classes.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer's forward pass.

        The layer is run with fastlora if possible, or else with PEFT's ``forward`` method. The
        output is the same as that of PEFT's layer.
        """
        call: Any = create_call(self, x)
        mixed = isinstance(call, MixedCall)
        if kwargs.get("adapter_names") is not None or not (mixed or call.names):
            reason = (
                "PEFT's own forward computes it; for rows without an adapter, pass None in "
                "fastlora.adapters()"
            )
            call.conditions.raise_if_batch_invariant(self, reason)
            if not (mixed or call.names or args or kwargs) and self.merged != self.disable_adapters:
                return call_base_layer(
                    call, self.base_layer, *args, **kwargs
                )  # as PEFT's forward does
            return super().forward(x, *args, **kwargs)
        if mixed:
            self._check_layer_supports_mixed_batch(call.routing)
        else:
            kwargs = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_BASE}
        base = self._read_or_call_base_layer(call, x, *args, **kwargs)
        return to_base_output_dtype(call, base, forward(call, base))

    def _read_or_call_base_layer(
        self: Any,
        call: UniformCall | MixedCall,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Base:
        """Return the base layer's weight and bias, or call the layer and return its output.

        The base layer is called if there are further arguments for it, or if fastlora cannot read
        its weight directly.
        """
        module, base = self.base_layer, None
        if not (args or kwargs):
            plain = not fallback_reason_not_plain_linear(module)
            base = Base(module.weight, module.bias) if plain else quantized_base_for_kernels(call)
        if base is not None:
            return base
        return Base(y=call_base_layer(call, module, *args, **kwargs))

    def _fusable_base(self: Any) -> Base | None:
        module = self.base_layer
        return (
            quantized_base_of_layer(self)
            if fallback_reason_not_plain_linear(module)
            else Base(module.weight, module.bias)
        )

    def _local_weight_if_quantized(self: Any) -> BaseQuantizedWeight | None:
        return quantized_weight_of(self.base_layer)

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the layer or update an existing adapter, as PEFT does.

        The state that fastlora keeps is then updated: the adapter's scaling is moved to the device
        of the factors, and the packed factors are cleared.
        """
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]  # as above
        self._move_scalings_to_factors([adapter_name])
        self._clear_model_packed_factors()

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Delete an adapter from the layer, and clear the layer's caches.

        The adapter is deleted by PEFT's own method.

        Raises:
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        if self.routing_group is not None:
            self.routing_group.check_no_open_blocks("delete_adapter")
        super().delete_adapter(adapter_name)  # type: ignore[misc]  # as above
        clear_layer_caches(self)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the base weight, as PEFT's layer does.

        The caches that fastlora keeps for the layer's weights are cleared first.
        """
        clear_base_and_adapter_caches(self)
        super().merge(*args, **kwargs)  # type: ignore[misc]  # PEFT's layer has it

    def unmerge(self: Any) -> None:
        """Unmerge the adapters from the layer's base weight.

        Before PEFT's own method unmerges the adapters, the caches that fastlora keeps for the
        layer's weights are cleared.
        """
        clear_base_and_adapter_caches(self)
        super().unmerge()  # type: ignore[misc]  # as above

    def _check_layer_supports_mixed_batch(self: Any, routing: Routing) -> None:
        """Raise `UnsupportedLayerError` if the layer does not support a mixed batch.

        The layer does not support the batch if an adapter in the routing uses a PEFT variant of
        LoRA that fastlora does not implement.
        """
        # Check all of the layer's adapters, so that graphs do not depend on which of them are in
        # the batch.
        for name, variant in self.lora_variant.items():
            if _has_unsupported_variant(self, name) and name in routing.names:
                raise UnsupportedLayerError(
                    f"adapter {name!r} uses {type(variant).__name__}, which does not support "
                    "mixed batches"
                )

    def _applied_adapters(self: Any) -> list[str]:
        """Return the names of the adapters that the layer applies.

        These are the active adapters of the layer. The list is empty if adapters are disabled or
        merged. The list is also empty if an active adapter uses a PEFT variant of LoRA that
        fastlora does not implement, because PEFT's ``forward`` method then applies the adapters.
        """
        if self.disable_adapters or self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.lora_A]
        return [] if any(_has_unsupported_variant(self, name) for name in names) else names

    @property
    def _disabled(self: Any) -> bool:  # type: ignore[override]  # PEFT's flag, which we only read
        return self.disable_adapters

    def fusion(self: Any, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A fused layer computes
        the base GEMM and the LoRA update in one call. ``gathered`` means that FSDP2 replaces
        shards with plain parameters during the forward pass.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        for name in names:
            if _has_unsupported_variant(self, name):
                variant = type(self.lora_variant[name]).__name__
                return FusionStatus(False, f"adapter {name!r} uses {variant}, which runs in PEFT")
        reason = fallback_reason_not_plain_linear(
            self.base_layer, gathered
        ) and fallback_reason_base_called(self)
        return fusion_status(self, names, reason, gathered)


def _has_unsupported_variant(layer: Any, name: str) -> bool:
    """Return whether an adapter uses a PEFT variant of LoRA that fastlora does not implement."""
    variant = layer.lora_variant.get(name)
    return variant is not None and (
        variant is not DoraLinearVariant and not isinstance(variant, DoraLinearVariant)
    )


class FastPeftLinear(_FusedForwardMixin, PeftLinear):  # type: ignore[misc]  # PEFT lets sizes be None
    """PEFT's LoRA linear layer with fastlora's fused forward pass.

    `patch_layer` replaces the class of PEFT's layer with this subclass.
    """


class FastPeftParamWrapper(PeftParamWrapper):
    """PEFT's `ParamWrapper`, patched with fastlora's forward pass.

    A `ParamWrapper` is PEFT's layer for one adapted parameter. If the parameter does not belong to
    stacked experts, or if fastlora cannot run the layer, PEFT's ``forward`` method runs.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward pass.

        The layer is run with fastlora if possible, or else with PEFT's ``forward`` method. PEFT's
        ``forward`` method always runs a layer whose module is not a module of stacked experts.
        """
        layer = None if kwargs or is_being_compiled() else self._layer_with_shared_adapters()
        return super().forward(x, *args, **kwargs) if layer is None else layer(x, *args)

    def _layer_with_shared_adapters(self: Any) -> FastLoraAdaptedParameters | None:
        """Return the fastlora layer that shares this layer's adapters.

        The fastlora layer computes the output of the module that this and any nested wrappers
        contain, and shares the adapters of all these wrappers. The result is None if PEFT's
        ``forward`` method must be called.
        """
        wrappers: list[Any] = [self]
        while isinstance(wrappers[-1].base_layer, PeftParamWrapper):
            wrappers.append(wrappers[-1].base_layer)
        base = wrappers[-1].base_layer
        layer_class = experts_layer_class(base)
        if "parametrizations" in base._modules or layer_class is None:
            return None
        if any(
            not isinstance(w, FastPeftParamWrapper) or w.disable_adapters or w.merged
            for w in wrappers
        ):
            return None
        layer = self.__dict__.get("_fastlora_layer")
        if layer is None or layer.base_layer is not base:
            trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
            layer = self.__dict__["_fastlora_layer"] = layer_class(base)
            for wrapper in wrappers:
                made = ParameterLoraLayer(base, wrapper.parameter_name)
                layer.parameters_with_adapters[wrapper.parameter_name] = made
            for parameter in trained:  # A new layer freezes its module.
                parameter.requires_grad_(True)
        for wrapper in wrappers:
            shared = layer.parameters_with_adapters[wrapper.parameter_name]
            for part in ("lora_A", "lora_B", "lora_dropout"):
                shared._modules[part] = wrapper._modules[part]
            shared.r, shared._active_adapters = wrapper.r, wrapper.active_adapters
            for name, scaling in wrapper.scaling.items():
                if shared.scaling.get(name) is not scaling:
                    shared.scaling[name] = scaling
        return layer

    def fusion(self) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A layer of this class
        is never fused. The reason states whether PEFT or the experts' layer computes the output.
        """
        found = experts_layer_class(self.get_base_layer())
        if found is None:
            return FusionStatus(False, "PEFT's own forward computes it")
        return FusionStatus(False, f"{found.__name__} computes it with its module")


def _copy_dunder_name_from_peft_base(cls: type) -> type:
    """Set the printed name of a patched class to the name of its PEFT base class.

    The function sets ``__name__``, which printed models and `get_layer_status` show. The class
    keeps its ``__qualname__``, which pickles use. The class itself is returned, so that this
    function can be used as a decorator.
    """
    cls.__name__ = next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("peft."))
    return cls


_copy_dunder_name_from_peft_base(FastPeftLinear)
_copy_dunder_name_from_peft_base(FastPeftParamWrapper)


@functools.cache
def _patched_class_for(peft_class: type) -> type | None:
    """Return the patched class for a PEFT layer class.

    It is the subclass that `patch_layer` substitutes for ``peft_class``. The result is None if
    fastlora does not patch layers of this class.
    """
    if peft_class is PeftLinear:
        return FastPeftLinear
    if peft_class is PeftParamWrapper:
        return FastPeftParamWrapper
    if (peft_class.__module__, peft_class.__name__) not in peft_quantized_layers():
        return None
    # The class can be imported by name (see __getattr__), so that patched models can be pickled.
    members = {"__module__": __name__}
    return _copy_dunder_name_from_peft_base(
        type(f"Fast{peft_class.__name__}", (_FusedForwardMixin, peft_class), members)
    )


def __getattr__(name: str) -> Any:
    for module, class_name in peft_quantized_layers():
        if name == f"Fast{class_name}":
            return _patched_class_for(getattr(importlib.import_module(module), class_name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Arguments for PEFT's variants and mixed batches, which the base layer does not accept.
_NOT_FOR_BASE = ("adapter_names", "alora_offsets")


class FastPeftLoraModel(PeftLoraModel):
    """PEFT's ``LoraModel`` with fastlora's LoRA layers.

    ``LoraModel`` is PEFT's LoRA tuner. PEFT creates each new LoRA layer, and `patch_layer` then
    replaces the class of the layer with fastlora's subclass, if there is one. The model supports
    mixed batches.
    """

    @staticmethod
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        module = PeftLoraModel._create_new_module(*args, **kwargs)
        patch_layer(module)
        return module

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
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        self._check_no_open_block("delete_adapter")
        super().delete_adapter(adapter_name)
        self._update_routed_layers()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the base weights."""
        self._check_no_open_block("merge_adapter")
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge adapters into the base weights, and return the base model without LoRA layers."""
        self._check_no_open_block("merge_and_unload")
        model = super().merge_and_unload(*args, **kwargs)
        _remove_router(model)
        return model

    def unload(self) -> nn.Module:
        """Remove the LoRA layers without merging, and return the base model."""
        self._check_no_open_block("unload")
        model = super().unload()
        _remove_router(model)
        return model

    def _check_no_open_block(self, operation: str) -> None:
        """Raise `AdapterStateError` if a `fastlora.adapters` block of the model is open.

        In such a block, rows are routed to adapters. A running call of the model with
        ``adapter_names`` counts as a block if fastlora routes the batch. ``operation`` is the name
        of the called method, for the error message.

        `disable_adapter_layers` does not call this method, because PEFT's context manager
        `disable_adapter` may call `disable_adapter_layers` inside a block.
        """
        router = _router_of_base_model(self.model)
        if router is not None:
            router.group.check_no_open_blocks(operation)

    def _update_routed_layers(self) -> None:
        """Update the list of routed layers.

        These are the LoRA layers for mixed batches. If the list does not exist yet, do nothing.
        """
        router = _router_of_base_model(self.model)
        if router is not None:
            router.update_routed_layers(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass, as PEFT's model does.

        Returns the model's output. If a `fastlora.adapters` block is open or fastlora routes
        ``adapter_names``, the batch size must match the number of adapter ids.
        """
        self._check_batch(args, kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            router = _router_of_base_model(self.model)
            if router is not None:
                discard_unused_results(router.group)

    def _check_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        router = _router_of_base_model(self.model)
        if router is not None and router.routed_layers:
            check_batch_matches_ids(router.group, args, kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Context manager that enables PEFT's forward hooks or fastlora's routing for a batch.

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
            routed = self._router_for(names)
        if routed is None:
            self._check_batch(args, kwargs)
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        slots = names_and_slots(tuple(self.peft_config), list(names or ()))
        seeds, source = draw_seeds(slots[0], None, draw=False), ParameterSource(slots[0])
        with routing_in_force(Routing(routed.group, *slots, seeds, source, routed.routed_layers)):
            check_batch_matches_ids(routed.group, args, kwargs)
            yield

    def _router_for(self, names: Any) -> PatchedModelRouter | None:
        """Return the router for a batch with the given adapter names.

        The result is None if fastlora cannot route the batch. PEFT then processes the batch or
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
            if layer.merged or any(_has_unsupported_variant(layer, name) for name in wanted):
                return None
        return found


_copy_dunder_name_from_peft_base(FastPeftLoraModel)


class PatchedModelRouter:
    """Routes batches to the adapters of a patched model.

    Each row of a mixed batch is routed to its own adapter. The router is stored on the base model,
    so that a `PeftModel`, its tuner, and the base model share one router.

    Args:
        model: The base model, into which PEFT has injected the LoRA layers.

    Attributes:
        group: The object that identifies the model's layers. It is never replaced, because open
            blocks refer to it. A deep copy or an unpickled model has a group of its own.
        names: The names of the model's adapters, in the order of ``peft_config``.
        routed_layers: The LoRA layers; an empty list until they are looked up.
        batch_check: The forward pre-hook that checks the batch size, or None. A tuner checks the
            batch size itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.group = model, RoutedLayerGroup()
        self.names: tuple[str, ...] = ()
        self.routed_layers: list[Any] = []
        self.batch_check: RemovableHandle | None = None

    def install_batch_check(self) -> None:
        """Make the base model check the batch size itself, for calls without a tuner."""
        if self.batch_check is not None:
            return
        model = self.model
        self.batch_check = model.register_forward_pre_hook(
            _check_batch_size_of_base_model, with_kwargs=True
        )
        if hasattr(type(model), "generate") and (
            "generate" not in vars(model) or _has_wrapped_generate(model)
        ):
            # A partial, unlike a closure, can be pickled and copied with the model.
            vars(model)["generate"] = functools.partial(_generate_after_batch_size_check, model)

    def find_routed_layers(self, root: nn.Module, *, search: bool = True) -> None:
        """Update the list of the model's routed layers.

        A routed layer is a LoRA layer that selects an adapter for each row of a mixed batch. The
        caller holds `_finding`.

        Args:
            root: The tuner or the model whose ``peft_config`` names the adapters.
            search: Whether to search the modules even if the adapters have not changed. A tuner
                reports the layers that it adds.

        Raises:
            UnsupportedLayerError: A module with adapters does not support mixed batches.
            AdapterStateError: A block is open for another model that shares layers with this one.
        """
        names: tuple[str, ...] = tuple(getattr(root, "peft_config", None) or ())
        group, before = self.group, self.routed_layers
        # A copy has no row checks yet, and another router may have taken layers into its group.
        joined = group.row_checks is not None and all(
            getattr(layer, "routing_group", None) is group for layer in before
        )
        if not search and before and joined and names == self.names:
            return
        layers: list[tuple[str, Any]] = []
        others: list[tuple[str, Any]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, _FusedForwardMixin):
                layers.append((name, module))
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                others.append((name, module))
        found = [layer for _, layer in layers]
        try:
            if not joined or [*map(id, found)] != [*map(id, before)]:
                self._add_to_group(layers)  # even if others fail: blocks may be open
            for name, module in others:
                _raise_mixed_batch_unsupported(name, module, isinstance(root, FastPeftLoraModel))
        except (UnsupportedLayerError, AdapterStateError):
            self.routed_layers = []
            raise
        patch_activation_checkpointing()  # because adapter_names= opens blocks too
        # Other threads read both without the lock, so they never see an unfinished search.
        self.names, self.routed_layers = names, found

    def _add_to_group(self, layers: list[tuple[str, Any]]) -> None:
        """Add layers to the router's group.

        Raises:
            AdapterStateError: A block is open for another model that contains one of the layers.
        """
        for _, layer in layers:
            if (
                layer.routing_group not in (None, self.group)
                and layer.routing_group.has_open_blocks
            ):
                raise AdapterStateError(
                    "a fastlora.adapters() block is open for another model that contains layers of "
                    f"this {type(self.model).__name__}; open the block after that block has ended"
                )
        add_to_group(self.group, self.model, layers)

    def update_routed_layers(self, root: nn.Module) -> None:
        """Look up the model's routed layers again.

        An error is not raised, because the next batch raises it.
        """
        with _finding, contextlib.suppress(UnsupportedLayerError, AdapterStateError):
            self.find_routed_layers(root)

    def _check_adapters_have_layers(self, ids: Sequence[str | None] | torch.Tensor) -> None:
        """Raise `AdapterNotFoundError` if no LoRA layer has an adapter that ``ids`` contains.

        Slots on a GPU are not checked.
        """
        present = set[str]().union(*(layer.lora_A for layer in self.routed_layers))
        for slot, name in enumerate(self.names):
            if name in present or (isinstance(ids, torch.Tensor) and ids.is_cuda):
                continue
            if bool((ids == slot).any()) if isinstance(ids, torch.Tensor) else name in ids:
                raise AdapterNotFoundError(
                    f"no LoRA layer has the adapter {name!r}, although peft_config contains it"
                )

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Create the routing that assigns an adapter to each row of a batch.

        The routing is for a `fastlora.adapters` block. See `fastlora.adapters`.
        """
        group, layers, known = self.group, self.routed_layers, self.names
        if self.batch_check is not None:  # Calls without a tuner change layers one by one.
            self._check_adapters_have_layers(ids)
        return routing_from_parameters(group, layers, known, ParameterSource, ids, seeds, validate)

    def sample_routings(self, adapters: int | None, ranks: Sequence[int] | None) -> list[Routing]:
        """Return sample routings for `warm_up`.

        See `fastlora.routing.routers.AdapterRouter`.
        """
        group, layers, known = self.group, self.routed_layers, self.names
        return sample_routings_from_parameters(
            group, layers, known, ParameterSource, adapters, ranks
        )


def _router_of_base_model(model: nn.Module) -> PatchedModelRouter | None:
    router: PatchedModelRouter | None = vars(model).get("_fastlora_router")
    return router


def _remove_router(model: nn.Module) -> None:
    """Remove the router of a base model, and what the router has installed on the model."""
    router = _router_of_base_model(model)
    if router is None:
        return
    del vars(model)["_fastlora_router"]
    if router.batch_check is not None:
        router.batch_check.remove()
    if _has_wrapped_generate(model):
        del vars(model)["generate"]


def _raise_mixed_batch_unsupported(name: str, module: nn.Module, has_tuner: bool) -> NoReturn:
    """Raise `UnsupportedLayerError` for a module with adapters that fastlora does not route."""
    if _patched_class_for(type(module)) is not None:  # type: ignore[arg-type]  # as above
        raise UnsupportedLayerError(
            f"{name!r} was added after fastlora.patch() and is not patched; call "
            "fastlora.patch(model) again"
        )
    kind, instead = type(module).__name__, "; pass adapter_names= to the model instead"
    if not isinstance(module, (PeftLoraLayer, AuxiliaryTrainingWrapper)):
        kind = f"{kind} of {type(module).__module__}"  # another method than LoRA
    raise UnsupportedLayerError(
        f"{name!r} is a PEFT {kind}, which fastlora.adapters() does not support"
        f"{instead if has_tuner else ''}"
    )


def _check_batch_size_of_base_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook that checks that the batch size matches the number of adapter ids.

    Raises:
        ValueError: The batch size does not match the number of adapter ids.
    """
    router = _router_of_base_model(model)
    if router is not None:
        check_batch_matches_ids(router.group, args, kwargs)


def _generate_after_batch_size_check(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the model's ``generate`` method.

    The number of adapter ids must match the number of samples. Beam search later adds rows to the
    batch, so the forward passes within ``generate`` do not check the batch size.

    Raises:
        ValueError: The batch size does not match the number of adapter ids.
    """
    router, model_class = _router_of_base_model(model), cast(Any, type(model))
    if router is None:  # The model is no longer patched.
        return model_class.generate(model, *args, **kwargs)
    check_batch_matches_ids(router.group, args, kwargs, per_sample=True)
    try:
        with skip_batch_size_check():
            return model_class.generate(model, *args, **kwargs)
    finally:
        discard_unused_results(router.group)


def _has_wrapped_generate(model: nn.Module) -> bool:
    """Return whether the model's ``generate`` is `_generate_after_batch_size_check`."""
    return getattr(vars(model).get("generate"), "func", None) is _generate_after_batch_size_check


_finding = threading.Lock()


def patched_model_router(model: nn.Module) -> PatchedModelRouter | None:
    """Return the router of a patched model.

    The router is a `PatchedModelRouter`, which routes the rows of mixed batches to adapters. The
    result is None if the model is not patched.

    Raises:
        UnsupportedLayerError: A module with adapters does not support mixed batches.
        AdapterStateError: A `fastlora.adapters` block is open for another model that shares layers
            with this one.
    """
    root, outside = _find_root(model)
    if root is None or getattr(root, "peft_config", None) is None:
        return None
    tuner = root if isinstance(root, FastPeftLoraModel) else None
    base: nn.Module = root if tuner is None else tuner.model
    with _finding:  # two threads must create only one group
        router = _router_of_base_model(base)
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
            f"the {type(model).__name__} has layers with adapters outside its "
            f"{type(base).__name__}; call fastlora.adapters() for the model that contains the "
            "layers of the named adapters"
        )
    return router


def _find_root(model: nn.Module) -> tuple[nn.Module | None, list[nn.Module]]:
    """Return the first module that routes adapters, and the modules that are visited outside of it.

    The module is a patched tuner, or a model into which PEFT injected LoRA layers that no tuner
    within the model contains. Returns None for it if there is no such module.
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
    """Return whether PEFT injected LoRA layers into a model that no tuner in it contains."""
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
        if isinstance(module, _FusedForwardMixin):
            layers.append(module)
        waiting += [child for child in module._modules.values() if child is not None]
    inside = {id(inner) for tuner in tuners for inner in tuner.modules()}
    return any(id(layer) not in inside for layer in layers)


def patch_layer(module: nn.Module) -> None:
    """Patch a PEFT LoRA layer in place so that fastlora computes the layer's output.

    The class of the layer is replaced with the patched class. Other modules are ignored.
    """
    fast = _patched_class_for(type(module))  # type: ignore[arg-type]  # a class is hashable
    if fast is not None:
        module.__class__ = fast
    if fast is not None and issubclass(fast, _FusedForwardMixin):
        module.scaling = module.__dict__.pop("scaling")  # as tensors, which compiled graphs read
        module._register_load_hook_that_moves_scalings()  # type: ignore[operator]  # defined by the new class


def unpatch_layer(module: nn.Module) -> None:
    """Undo `patch_layer` on a layer.

    The layer gets back its original class, and thus PEFT's forward method. Modules that are not
    patched are ignored.

    Raises:
        UnsupportedLayerError: Other code replaced the layer's class after `patch_layer` was called.
    """
    if isinstance(module, FastPeftParamWrapper):
        module.__dict__.pop("_fastlora_layer", None)
        module.__class__ = PeftParamWrapper  # type: ignore[assignment]  # what it was before
    if not isinstance(module, _FusedForwardMixin):
        return
    check_can_unpatch(module)
    module._remove_load_hook_that_moves_scalings()
    scalings = dict(module.__dict__.pop("_scaling"))
    module.__class__ = type(module).__bases__[1]  # the base after _FusedForwardMixin
    module.scaling = scalings
    for name in _OWN_ATTRIBUTES:
        module.__dict__.pop(name, None)


# Attributes that the patched forward method adds to a layer.
_OWN_ATTRIBUTES = (
    "_dora_norms",
    "_kernel_weights",
    "_shared_input_group",
    "_compiled_fallback_reason",
    "routing_group",
    "routing_index",
    "may_see_partial_rows",
)


def check_can_unpatch(module: nn.Module) -> None:
    """Check that a layer can be unpatched.

    Raises:
        UnsupportedLayerError: If other code has replaced the class of the patched layer.
    """
    if isinstance(module, _FusedForwardMixin) and _FusedForwardMixin not in type(module).__bases__:
        raise UnsupportedLayerError(
            "cannot unpatch a layer, because other code changed its class to "
            f"{type(module).__name__}, which is a subclass of "
            f"{type(module).__mro__[1].__qualname__}; undo that change first"
        )


def patch_model(model: nn.Module) -> int:
    """Patch a PEFT model in place, and return the number of its LoRA layers.

    The LoRA layers are patched to run with fastlora. The returned number includes LoRA layers of
    classes that fastlora does not patch, which remain unchanged. The model's tuners are also
    patched.
    """
    seen = 0
    for module in model.modules():
        if isinstance(module, PeftLoraLayer) and not isinstance(module, LoraLayer):
            seen += 1
            patch_layer(module)
        elif type(module) is PeftLoraModel:
            module.__class__ = FastPeftLoraModel
    for module in model.modules():
        router = _router_of_base_model(module)
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
        _remove_router(module)
        if type(module) is FastPeftLoraModel:
            module.__class__ = PeftLoraModel  # type: ignore[assignment]  # as above


def peft_layer_fusion_status(module: nn.Module, gathered: bool = False) -> FusionStatus | None:
    """Return the fusion status of a PEFT LoRA layer.

    The result is None for any other module.
    """
    if isinstance(module, _FusedForwardMixin):
        return module.fusion(gathered)
    if isinstance(module, FastPeftParamWrapper):
        return module.fusion()
    if _patched_class_for(type(module)) is not None:  # type: ignore[arg-type]  # as above
        return FusionStatus(False, "unpatched PEFT layer; call fastlora.patch(model) to fuse it")
    if isinstance(module, PeftLoraLayer):
        return FusionStatus(
            False, f"PEFT {type(module).__name__} layer, which fastlora.patch() leaves unchanged"
        )
    return None
