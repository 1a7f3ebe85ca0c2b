"""Subclasses of PEFT's LoRA layers that compute their outputs with fastlora.

`patch_layer` replaces the class of a PEFT layer with one of these subclasses. The layer retains its
parameters, hooks, and state. The subclasses override ``forward`` and the methods that must clear
caches or check for open blocks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters, ParameterLoraLayer
from fastlora.layers.base_adapter_layer import BaseAdapterLayer, clear_layer_caches
from fastlora.layers.base_layers import fallback_reason_not_plain_linear
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.fallback_reasons import FusionStatus, fusion_status
from fastlora.layers.linear_forward import create_call, forward
from fastlora.layers.quantized import (
    BaseQuantizedWeight,
    peft_quantized_layer_classes,
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
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.routing import Routing
from fastlora.validation import UnsupportedLayerError

_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_signature_of(function: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Decorate a method so that `inspect.signature` returns the signature of ``function``.

    Libraries such as diffusers inspect the arguments of PEFT's methods.
    """
    return functools.wraps(function, assigned=(), updated=())  # type: ignore[return-value]


class FusedForwardMixin(BaseAdapterLayer):
    """Mixin that gives PEFT's LoRA layers fastlora's fused forward pass.

    It implements the forward pass of every patched layer. In cases that fastlora does not support,
    it calls the forward method of PEFT's layer. In each patched class, this mixin precedes the PEFT
    layer class in the list of base classes.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the forward pass of PEFT's LoRA layer through fastlora, if possible.

        PEFT's ``forward`` method runs the layer if fastlora cannot. The output is the same as that
        of PEFT's layer.
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
        """Read the base layer's weight and bias if possible, or call the layer.

        The base layer is called if its weight cannot be read directly, or if there are additional
        arguments for the layer. The result is a `Base` that contains either the weight and the bias
        or the layer's output.
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

    @with_signature_of(PeftLinear.update_layer)
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Run PEFT's ``update_layer``, and update the state that fastlora keeps for the adapter.

        PEFT's method adds the adapter to the layer, or updates it if it already exists. The
        adapter's scaling is then moved to the device of the factors, and the packed factors are
        cleared.
        """
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]  # as above
        self._move_scalings_to_factors([adapter_name])
        self._clear_model_packed_factors()

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Delete an adapter from the layer.

        The adapter is deleted by PEFT's own method. The layer's caches are then cleared.

        Raises:
            AdapterStateError: A `fastlora.adapters` block is open for the model.
        """
        if self.routing_group is not None:
            self.routing_group.check_no_open_blocks("delete_adapter")
        super().delete_adapter(adapter_name)  # type: ignore[misc]  # as above
        clear_layer_caches(self)

    @with_signature_of(PeftLinear.merge)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the base weight, with the arguments of PEFT's method.

        PEFT's method merges the adapters. Before that, the caches that fastlora keeps for the
        layer's weights are cleared.
        """
        clear_base_and_adapter_caches(self)
        super().merge(*args, **kwargs)  # type: ignore[misc]  # PEFT's layer has it

    def unmerge(self: Any) -> None:
        """Unmerge the adapters from the base weight of the patched PEFT layer.

        Before PEFT's own method unmerges the adapters, the caches that fastlora keeps for the
        layer's weights are cleared.
        """
        clear_base_and_adapter_caches(self)
        super().unmerge()  # type: ignore[misc]  # as above

    def _check_layer_supports_mixed_batch(self: Any, routing: Routing) -> None:
        """Raise `UnsupportedLayerError` if the layer does not support mixed batches.

        The layer does not support them if an adapter in the routing uses a PEFT variant of LoRA
        that fastlora does not implement.
        """
        # Check all of the layer's adapters, so that graphs do not depend on which of them are in
        # the batch.
        for name, variant in self.lora_variant.items():
            if has_unsupported_variant(self, name) and name in routing.names:
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
        return [] if any(has_unsupported_variant(self, name) for name in names) else names

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
            if has_unsupported_variant(self, name):
                variant = type(self.lora_variant[name]).__name__
                return FusionStatus(False, f"adapter {name!r} uses {variant}, which runs in PEFT")
        reason = fallback_reason_not_plain_linear(
            self.base_layer, gathered
        ) and fallback_reason_base_called(self)
        return fusion_status(self, names, reason, gathered)


def has_unsupported_variant(layer: Any, name: str) -> bool:
    """Return whether an adapter uses a PEFT variant of LoRA that fastlora does not implement."""
    variant = layer.lora_variant.get(name)
    return variant is not None and (
        variant is not DoraLinearVariant and not isinstance(variant, DoraLinearVariant)
    )


class FastPeftLinear(FusedForwardMixin, PeftLinear):  # type: ignore[misc]  # PEFT lets sizes be None
    """Replacement for PEFT's LoRA linear layer, with fastlora's fused forward pass.

    `patch_layer` replaces the class of PEFT's layer with this subclass.
    """


class FastPeftParamWrapper(PeftParamWrapper):
    """Replacement for PEFT's `ParamWrapper`, with fastlora's forward pass.

    A `ParamWrapper` is PEFT's layer for one adapted parameter. `patch_layer` replaces its class
    with this subclass. If the parameter does not belong to stacked experts, or if fastlora cannot
    run the layer, PEFT's ``forward`` method runs.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of PEFT's parameter wrapper through fastlora, if possible.

        PEFT's ``forward`` method runs the layer if fastlora cannot. For example, fastlora cannot
        run a layer whose module is not a module of stacked experts.
        """
        layer = None if kwargs or is_being_compiled() else self._layer_with_shared_adapters()
        return super().forward(x, *args, **kwargs) if layer is None else layer(x, *args)

    def _layer_with_shared_adapters(self: Any) -> FastLoraAdaptedParameters | None:
        """Return the fastlora layer that shares this layer's adapters.

        The fastlora layer computes the output of the module that this and any nested wrappers
        contain, and shares the adapters of all these wrappers. The result is None if
        fastlora cannot provide such a layer. In this case, PEFT's ``forward`` method must be
        called.
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


def copy_dunder_name_from_peft_base(cls: type) -> type:
    """Give a patched class the ``__name__`` of its PEFT base class.

    Printed models and `get_layer_status` thus show the name of PEFT's class. The patched class
    keeps its ``__qualname__``, which pickles use. The class itself is returned, so that this
    function can be used as a decorator.
    """
    cls.__name__ = next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("peft."))
    return cls


copy_dunder_name_from_peft_base(FastPeftLinear)


copy_dunder_name_from_peft_base(FastPeftParamWrapper)


@functools.cache
def patched_class_for(peft_class: type) -> type | None:
    """Return the patched class for a PEFT layer class.

    It is the subclass that `patch_layer` substitutes for ``peft_class``. The result is None if
    fastlora does not patch layers of this class.
    """
    if peft_class is PeftLinear:
        return FastPeftLinear
    if peft_class is PeftParamWrapper:
        return FastPeftParamWrapper
    if (peft_class.__module__, peft_class.__name__) not in peft_quantized_layer_classes():
        return None
    # The class can be imported by name (see __getattr__), so that patched models can be pickled.
    members = {"__module__": __name__}
    return copy_dunder_name_from_peft_base(
        type(f"Fast{peft_class.__name__}", (FusedForwardMixin, peft_class), members)
    )


def __getattr__(name: str) -> Any:
    for module, class_name in peft_quantized_layer_classes():
        if name == f"Fast{class_name}":
            return patched_class_for(getattr(importlib.import_module(module), class_name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Arguments for PEFT's variants and mixed batches, which the base layer does not accept.
_NOT_FOR_BASE = ("adapter_names", "alora_offsets")


def patch_layer(module: nn.Module) -> None:
    """Patch a PEFT LoRA layer in place so that fastlora computes the layer's output.

    The class of the layer is replaced with the patched class. Other modules are ignored.
    """
    fast = patched_class_for(type(module))  # type: ignore[arg-type]  # a class is hashable
    if fast is not None:
        module.__class__ = fast
        patch_activation_checkpointing()
    if fast is not None and issubclass(fast, FusedForwardMixin):
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
    if not isinstance(module, FusedForwardMixin):
        return
    check_can_unpatch(module)
    module._remove_load_hook_that_moves_scalings()
    scalings = dict(module.__dict__.pop("_scaling"))
    module.__class__ = type(module).__bases__[1]  # the base after FusedForwardMixin
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
    if isinstance(module, FusedForwardMixin) and FusedForwardMixin not in type(module).__bases__:
        raise UnsupportedLayerError(
            "cannot unpatch a layer, because other code changed its class to "
            f"{type(module).__name__}, which is a subclass of "
            f"{type(module).__mro__[1].__qualname__}; undo that change first"
        )


def peft_layer_fusion_status(module: nn.Module, gathered: bool = False) -> FusionStatus | None:
    """Return the fusion status of a PEFT LoRA layer.

    The result is None for any other module.
    """
    if isinstance(module, FusedForwardMixin):
        return module.fusion(gathered)
    if isinstance(module, FastPeftParamWrapper):
        return module.fusion()
    if patched_class_for(type(module)) is not None:  # type: ignore[arg-type]  # as above
        return FusionStatus(False, "unpatched PEFT layer; call fastlora.patch(model) to fuse it")
    if isinstance(module, PeftLoraLayer):
        return FusionStatus(
            False, f"PEFT {type(module).__name__} layer, which fastlora.patch() leaves unchanged"
        )
    return None
