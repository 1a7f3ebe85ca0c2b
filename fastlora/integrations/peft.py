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
from typing import Any

import torch
from peft.tuners.lora import LoraModel as PeftLoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fastlora.layers.base import LoraLayer
from fastlora.layers.bases import why_not_plain
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.coded_base import (
    as_called,
    call_base,
    coded_base,
    forget_weights,
    sibling_base,
    why_called,
)
from fastlora.layers.common import CommonLayer, forget_kept
from fastlora.layers.factors import Parameters
from fastlora.layers.forward import begin, forward
from fastlora.layers.quantised import Quantised, keep_layout, peft_layers, quantised
from fastlora.layers.why import fusion
from fastlora.ops.factors import Base
from fastlora.ops.seeds import draw_seeds
from fastlora.routing.block import parameters_routing
from fastlora.routing.checkpoints import keep_routing
from fastlora.routing.ids import BASE, named_ids
from fastlora.routing.in_force import check_batch, end_forward
from fastlora.routing.in_force import routed as routing_in_force
from fastlora.routing.routing import Group, Routing, join_group
from fastlora.validation import UnsupportedLayerError


class _FastForward(CommonLayer):
    """Mixin that implements the forward pass of every patched layer.

    In cases that fastlora does not support, it calls the forward method of PEFT's layer. In each
    patched class, this mixin precedes the PEFT layer class in the list of base classes.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the same output as ``forward`` of the PEFT layer that was patched."""
        call: Any = begin(self, x)
        mixed = isinstance(call, MixedCall)
        if kwargs.get("adapter_names") is not None or not (mixed or call.names):
            why = (
                "PEFT's own forward computes it; for rows without an adapter, pass None in "
                "fastlora.adapters()"
            )
            call.conditions.refuse(self, why)
            if not (mixed or call.names or args or kwargs) and self.merged != self.disable_adapters:
                return call_base(call, self.base_layer, *args, **kwargs)  # as PEFT's forward does
            return super().forward(x, *args, **kwargs)
        if mixed:
            self._check_variants(call.routing)
        else:
            kwargs = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_BASE}
        base = self._base(call, x, *args, **kwargs)
        return as_called(call, base, forward(call, base))

    def _base(
        self: Any, call: LayerCall | MixedCall, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Base:
        """Return the base layer's weight and bias, or else its output for ``x``.

        The output is computed only if the base layer is called with further arguments, or if
        fastlora cannot read the base layer's weight directly.
        """
        module, base = self.base_layer, None
        if not (args or kwargs):
            plain = not why_not_plain(module)
            base = Base(module.weight, module.bias) if plain else coded_base(call)
        if base is not None:
            return base
        return Base(y=call_base(call, module, *args, **kwargs))

    def _plain_base(self: Any) -> Base | None:
        module = self.base_layer
        return sibling_base(self) if why_not_plain(module) else Base(module.weight, module.bias)

    def _own_quantised(self: Any) -> Quantised | None:
        return quantised(self.base_layer)

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add or replace an adapter, as PEFT's layer does, and clear the packed factors."""
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]  # as above
        self._fit_scalings([adapter_name])
        self._forget_packed()

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Delete an adapter, as PEFT's layer does, and clear the layer's caches.

        Raises:
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        if self.routed_by is not None:
            self.routed_by.check_closed("delete_adapter")
        super().delete_adapter(adapter_name)  # type: ignore[misc]  # as above
        forget_kept(self)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """Merge adapters, as PEFT's layer does, and clear values cached for the base weight."""
        forget_weights(self)
        super().merge(*args, **kwargs)  # type: ignore[misc]  # PEFT's layer has it

    def unmerge(self: Any) -> None:
        """Unmerge adapters, as PEFT's layer does, and clear values cached for the base weight."""
        forget_weights(self)
        super().unmerge()  # type: ignore[misc]  # as above

    def _check_variants(self: Any, routing: Routing) -> None:
        """Raise `UnsupportedLayerError` if an adapter of ``routing`` cannot be in a mixed batch."""
        # Check all of the layer's adapters, so that graphs do not depend on which of them are in
        # the batch.
        for name, variant in self.lora_variant.items():
            if _foreign_variant(self, name) and name in routing.names:
                raise UnsupportedLayerError(
                    f"adapter {name!r} uses {type(variant).__name__}, which cannot be mixed with "
                    "other adapters in a batch"
                )

    def _acting(self: Any) -> list[str]:
        """Return the names of the adapters that fastlora applies in the next forward pass.

        The list is empty if adapters are disabled or merged, or if PEFT's forward must be called.
        """
        if self.disable_adapters or self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.lora_A]
        return [] if any(_foreign_variant(self, name) for name in names) else names

    @property
    def _disabled(self: Any) -> bool:  # type: ignore[override]  # PEFT's flag, which we only read
        return self.disable_adapters

    def fusion(self: Any, gathered: bool = False) -> tuple[bool, str]:
        """Return a tuple ``(fused, fallback_reason)`` for this layer.

        ``fused`` is True if the base GEMM and the LoRA term are computed in one call.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        for name in names:
            if _foreign_variant(self, name):
                return False, (
                    f"adapter {name!r} uses {type(self.lora_variant[name]).__name__}, which runs "
                    "in PEFT"
                )
        why = why_not_plain(self.base_layer, gathered) and why_called(self)
        return fusion(self, names, why, gathered)


def _foreign_variant(layer: Any, name: str) -> bool:
    """Return whether an adapter uses a LoRA variant of PEFT other than DoRA on a linear layer."""
    variant = layer.lora_variant.get(name)
    return variant is not None and (
        variant is not DoraLinearVariant and not isinstance(variant, DoraLinearVariant)
    )


class FastPeftLinear(_FastForward, PeftLinear):  # type: ignore[misc]  # PEFT lets sizes be None
    """PEFT's LoRA linear layer with fastlora's fused forward pass."""


def _named_as_before(cls: type) -> type:
    """Set the ``__name__`` of a patched class to the name of its PEFT base class.

    Printed models and `get_layer_status` then show PEFT's class name. Pickles use the qualified
    name, which does not change. The class itself is returned, so that this function can be used as
    a decorator.
    """
    cls.__name__ = next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("peft."))
    return cls


_named_as_before(FastPeftLinear)


@functools.cache
def _fast_class(peft_class: type) -> type | None:
    """Return the subclass that `patch_layer` substitutes for a PEFT layer class.

    The result is None if fastlora does not patch layers of this class.
    """
    if peft_class is PeftLinear:
        return FastPeftLinear
    if (peft_class.__module__, peft_class.__name__) not in peft_layers():
        return None
    # The class can be imported by name (see __getattr__), so that patched models can be pickled.
    members = {"__module__": __name__}
    return _named_as_before(type(f"Fast{peft_class.__name__}", (_FastForward, peft_class), members))


def __getattr__(name: str) -> Any:
    for module, class_name in peft_layers():
        if name == f"Fast{class_name}":
            return _fast_class(getattr(importlib.import_module(module), class_name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Arguments for PEFT's variants and mixed batches, which the base layer does not accept.
_NOT_FOR_BASE = ("adapter_names", "alora_offsets")


class FastPeftLoraModel(PeftLoraModel):
    """Subclass of PEFT's LoRA tuner that patches each new LoRA layer when it is created."""

    @staticmethod
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        module = PeftLoraModel._create_new_module(*args, **kwargs)
        patch_layer(module)
        return module

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. Open `fastlora.adapters` blocks also apply to the new LoRA layers."""
        super().inject_adapter(*args, **kwargs)
        self._find_again()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and look up the model's LoRA layers again."""
        self._check_closed("delete_adapter")
        super().delete_adapter(adapter_name)
        self._find_again()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the base weights."""
        self._check_closed("merge_adapter")
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge adapters into the base weights, and return the base model without LoRA layers."""
        self._check_closed("merge_and_unload")
        return super().merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """Remove the LoRA layers, and return the base model."""
        self._check_closed("unload")
        return super().unload()

    def _check_closed(self, operation: str) -> None:
        """Raise `AdapterStateError` if a `fastlora.adapters` block of the model is open.

        `disable_adapter_layers` does not call this method, because PEFT's context manager
        `disable_adapter` may call `disable_adapter_layers` inside a block.
        """
        kept = self.__dict__.get("_fastlora_routed")
        if kept is not None:
            kept.group.check_closed(operation)

    def _find_again(self) -> None:
        """Update the list of layers used for mixed batches, if it was created before."""
        kept = self.__dict__.get("_fastlora_routed")
        if kept is not None:
            kept.routed = None
            with contextlib.suppress(UnsupportedLayerError):  # the next batch raises it
                routed_model(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        In a `fastlora.adapters` block, the batch size must match the number of adapter ids.
        """
        self._check_batch(args, kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            kept = self.__dict__.get("_fastlora_routed")
            if kept is not None:
                end_forward(kept.group)

    def _check_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = self.__dict__.get("_fastlora_routed")
        if kept is not None and kept.routed is not None:
            check_batch(kept.group, args, kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Assign adapters to rows according to ``adapter_names`` for the duration of a call.

        The assignment is computed once for the whole model. PEFT computes it at every layer.
        """
        names = kwargs.get("adapter_names")
        if names is None or self.training or kwargs.get("alora_offsets") is not None:
            routed = None
        else:
            routed = self._routed_for(names)
        if routed is None:
            self._check_batch(args, kwargs)
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        slots = named_ids(tuple(self.peft_config), list(names or ()))
        seeds, source = draw_seeds(slots[0], None, draw=False), Parameters(slots[0])
        with routing_in_force(Routing(routed.group, *slots, seeds, source, routed.layers())):
            check_batch(routed.group, args, kwargs)
            yield

    def _routed_for(self, names: Any) -> RoutedPeftModel | None:
        """Return the object that assigns adapters to the rows of a batch.

        The result is None if PEFT must process the batch, or raise an error for it.
        """
        wanted = {name for name in names if name != BASE}
        if not wanted <= set(self.peft_config):
            return None
        try:
            found = routed_model(self)
        except UnsupportedLayerError:
            return None
        layers = () if found is None else found.layers()
        for layer in layers:
            if layer.merged or any(_foreign_variant(layer, name) for name in wanted):
                return None
        return found


_named_as_before(FastPeftLoraModel)


class RoutedPeftModel:
    """The LoRA layers and the routing group of a patched model, for `fastlora.adapters` blocks.

    The object is stored on the model's tuner.

    Args:
        tuner: The model's tuner. If the model is copied, the copy creates its own
            `RoutedPeftModel`.

    Attributes:
        group: The object that identifies the model's layers. It is never replaced, because open
            blocks refer to it.
        routed: The LoRA layers, or None until they are looked up.
    """

    def __init__(self, tuner: FastPeftLoraModel) -> None:
        self.tuner, self.group = tuner, Group()
        self.routed: list[Any] | None = None

    def layers(self) -> list[Any]:
        """Return a list of the LoRA layers that select an adapter for each row of a mixed batch.

        Raises:
            UnsupportedLayerError: A module with adapters does not support mixed batches.
        """
        if self.routed is not None:
            return self.routed
        layers, others = [], []
        for name, module in self.tuner.named_modules():
            if isinstance(module, _FastForward):
                layers.append((name, module))
            elif isinstance(module, (PeftLoraLayer, AuxiliaryTrainingWrapper)):
                others.append((name, module))
        join_group(self.group, self.tuner, layers)  # even if others fail: blocks may be open
        for name, module in others:
            raise UnsupportedLayerError(
                f"{name!r} is a PEFT {type(module).__name__}, which fastlora.adapters() does not "
                "route; pass adapter_names= to the model instead"
            )
        keep_routing()  # because adapter_names= opens blocks too
        self.routed = [layer for _, layer in layers]
        return self.routed

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Create the routing for a `fastlora.adapters` block. See `fastlora.adapters`."""
        known = tuple(self.tuner.peft_config)
        group, layers = self.group, self.layers()
        return parameters_routing(group, layers, known, Parameters, ids, seeds, validate)


_finding = threading.Lock()


def routed_model(model: nn.Module) -> RoutedPeftModel | None:
    """Return the `RoutedPeftModel` of a patched model, or None if the model is not patched.

    Raises:
        UnsupportedLayerError: A module with adapters does not support mixed batches.
    """
    tuner = next((m for m in model.modules() if isinstance(m, FastPeftLoraModel)), None)
    if tuner is None:
        return None
    with _finding:  # two threads must create only one group
        kept: RoutedPeftModel | None = tuner.__dict__.get("_fastlora_routed")
        if kept is None or kept.tuner is not tuner:
            kept = tuner.__dict__["_fastlora_routed"] = RoutedPeftModel(tuner)
        kept.layers()
    return kept


def patch_layer(module: nn.Module) -> None:
    """Replace the class of a PEFT LoRA layer with the patched class. Ignore other modules."""
    fast = _fast_class(type(module))  # type: ignore[arg-type]  # a class is hashable
    if fast is not None:
        module.__class__ = fast
        module.scaling = module.__dict__.pop("scaling")  # as tensors, which compiled graphs read
        module._watch_loads()  # type: ignore[operator]  # defined by the new class


def unpatch_layer(module: nn.Module) -> None:
    """Restore the class that a layer had before `patch_layer`. Ignore modules that are not patched.

    Raises:
        UnsupportedLayerError: Other code has replaced the layer's class after `patch_layer`.
    """
    if not isinstance(module, _FastForward):
        return
    check_unpatches(module)
    module._unwatch_loads()
    scalings = dict(module.__dict__.pop("_scaling"))
    module.__class__ = type(module).__bases__[1]  # the base after _FastForward
    module.scaling = scalings
    for name in _OWN_ATTRIBUTES:
        module.__dict__.pop(name, None)


# Attributes that the patched forward method adds to a layer.
_OWN_ATTRIBUTES = (
    "_dora_norms",
    "_coded",
    "_shared_input",
    "_compiled_alone",
    "routed_by",
    "routed_as",
    "sees_part",
)


def check_unpatches(module: nn.Module) -> None:
    """Raise `UnsupportedLayerError` if other code has replaced the class of a patched layer."""
    if isinstance(module, _FastForward) and _FastForward not in type(module).__bases__:
        raise UnsupportedLayerError(
            "cannot unpatch a layer, because other code changed its class to "
            f"{type(module).__name__}, based on {type(module).__mro__[1].__qualname__}; undo that "
            "change first"
        )


def patch_model(model: nn.Module) -> int:
    """Patch all LoRA layers and tuners of a PEFT model, and return the number of LoRA layers.

    The number includes LoRA layers of classes that fastlora does not patch.
    """
    seen = 0
    for module in model.modules():
        if isinstance(module, PeftLoraLayer) and not isinstance(module, LoraLayer):
            seen += 1
            patch_layer(module)
        elif type(module) is PeftLoraModel:
            module.__class__ = FastPeftLoraModel
    if any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name):
        keep_layout(model)
    return seen


def unpatch_model(model: nn.Module) -> None:
    """Restore the classes that the layers and tuners of a model had before `patch_model`."""
    for module in model.modules():
        check_unpatches(module)
    for module in model.modules():
        unpatch_layer(module)
        if type(module) is FastPeftLoraModel:
            module.__dict__.pop("_fastlora_routed", None)
            module.__class__ = PeftLoraModel  # type: ignore[assignment]  # as above


def layer_fusion(module: nn.Module, gathered: bool = False) -> tuple[bool, str] | None:
    """Return a tuple ``(fused, fallback_reason)`` for a PEFT LoRA layer.

    For any other module, the result is None.
    """
    if isinstance(module, _FastForward):
        return module.fusion(gathered)
    if _fast_class(type(module)) is not None:  # type: ignore[arg-type]  # as above
        return False, "unpatched PEFT layer; call fastlora.patch(model) to fuse it"
    if isinstance(module, PeftLoraLayer):
        return False, f"PEFT {type(module).__name__} layer, which fastlora.patch() leaves unchanged"
    return None
