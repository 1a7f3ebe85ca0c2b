"""Make fastlora's configs, models, and layers pass `isinstance` checks against PEFT's classes.

TRL, transformers, and accelerate recognize PEFT's objects with `isinstance`. When PEFT is imported,
PEFT's classes become additional base classes of fastlora's config and model, and fastlora's layers
are registered with PEFT's abstract classes. Either library may be imported first. This module does
not import PEFT itself.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from typing import Any

from torch import nn

from fastlora.integrations.import_hooks import call_when_imported
from fastlora.integrations.peft_overrides import has_fastlora_layers, override_peft_functions
from fastlora.layers import LoraLayer
from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters, ParameterLoraLayer
from fastlora.model import LoraModel
from fastlora.model.config import LoraConfig
from fastlora.validation import AdapterStateError


@functools.cache
def register_as_peft_subclasses() -> None:
    """Register fastlora's classes as subclasses of PEFT's classes.

    `isinstance` then treats instances of fastlora's classes as instances of PEFT's classes. PEFT's
    functions are overridden, so that they also accept fastlora's models.
    """
    theirs: Any = importlib.import_module("peft.tuners.lora")
    layers: Any = importlib.import_module("peft.tuners.tuners_utils")
    peft: Any = importlib.import_module("peft")
    LoraConfig.__bases__ = (*LoraConfig.__bases__, theirs.LoraConfig)
    # PEFT finds the DoRA field by its metadata.
    notes = {f.name: f.metadata for f in dataclasses.fields(theirs.LoraConfig)}
    for field in dataclasses.fields(LoraConfig):
        field.metadata = notes.get(field.name, field.metadata)
    if "config" in inspect.signature(theirs.layer.dispatch_default).parameters:
        # PEFT creates LoRA layers through this mapping. Older versions do not pass the config to
        # it.
        LoraConfig._custom_modules = {nn.Module: _create_and_patch_peft_layer}
    ours = (base for base in LoraModel.__bases__ if base is not nn.Module)
    LoraModel.__bases__ = (*ours, peft.PeftModel)
    theirs.LoraLayer.__subclasshook__ = classmethod(_subclasshook_excluding_adapted_parameters)
    for abstract in (layers.BaseTunerLayer, theirs.LoraLayer):
        abstract.register(LoraLayer)
    if hasattr(theirs.layer, "ParamWrapper"):  # older versions do not adapt parameters
        theirs.layer.ParamWrapper.register(ParameterLoraLayer)
    _make_from_pretrained_accept_lora_model(peft)
    _make_tuner_reject_fastlora_layers(theirs.LoraModel)
    override_peft_functions()


def _subclasshook_excluding_adapted_parameters(lora_layer_class: type, subclass: type) -> Any:
    """Prevent `FastLoraAdaptedParameters` from counting as a subclass of PEFT's ``LoraLayer``.

    The result is False for this class. The result is NotImplemented for all other classes, which
    are checked as usual, so fastlora's other layers count as registered subclasses. The factors of
    `FastLoraAdaptedParameters` are in its inner layers, which are PEFT's `ParamWrapper`. PEFT has
    no layer around its wrappers.
    """
    return False if issubclass(subclass, FastLoraAdaptedParameters) else NotImplemented


def _create_and_patch_peft_layer(
    target: nn.Module, adapter_name: str, *, config: Any, **options: Any
) -> Any:
    """Create a PEFT LoRA layer for a module, and patch the layer.

    PEFT's LoRA tuner creates the layer. The layer is then patched in the same way as by
    `fastlora.patch`.
    """
    from peft.tuners.lora import LoraModel as PeftTuner

    from fastlora.integrations.peft_layers import patch_layer

    plain = copy.copy(config)  # keeps the attributes that PEFT has set
    plain._custom_modules = None
    layer = PeftTuner._create_new_module(plain, adapter_name, target, **options)
    patch_layer(layer)
    return layer


def _make_from_pretrained_accept_lora_model(peft: Any) -> None:
    """Make PEFT's ``from_pretrained`` also accept a `LoraModel`.

    The method of `peft.PeftModel` is overridden. If the new method is called with a `LoraModel`,
    fastlora loads the adapter into the model.
    """
    theirs = peft.PeftModel.from_pretrained.__func__

    @functools.wraps(theirs)
    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, LoraModel):
            return LoraModel.from_pretrained(model, *args, **kwargs)
        return theirs(cls, model, *args, **kwargs)

    peft.PeftModel.from_pretrained = classmethod(from_pretrained)


def _make_tuner_reject_fastlora_layers(tuner: Any) -> None:
    """Make PEFT's LoRA tuner raise an error for a model that has fastlora's layers.

    The tuner cannot add adapters to these layers. The error is raised before the model changes.
    """
    theirs = tuner.__init__

    @functools.wraps(theirs)
    def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if has_fastlora_layers(model):
            raise AdapterStateError(
                "the model already has LoRA layers of fastlora, to which PEFT cannot add adapters; "
                "use add_adapter() of the fastlora model, or unload() it first"
            )
        theirs(self, model, *args, **kwargs)

    tuner.__init__ = __init__


call_when_imported("peft", register_as_peft_subclasses)
