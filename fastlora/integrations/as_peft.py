"""Where PEFT is imported, our config, model and layers are PEFT's too: `isinstance` says so.

TRL, transformers and accelerate ask with `isinstance` what they were given. Our classes take PEFT's
as bases (configs and models) or are registered with PEFT's abstract classes (layers) right after
`import peft`, whichever of the two libraries is imported first. Nothing here imports PEFT.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from typing import Any

from torch import nn

from fastlora.integrations.answers import answer_for_peft
from fastlora.integrations.when_imported import when_imported
from fastlora.layers import LoraLayer
from fastlora.model import LoraModel
from fastlora.model.config import LoraConfig


@functools.cache
def join_peft() -> None:
    """Makes our classes PEFT's, and PEFT's functions by name answer for our models."""
    theirs: Any = importlib.import_module("peft.tuners.lora")
    layers: Any = importlib.import_module("peft.tuners.tuners_utils")
    peft: Any = importlib.import_module("peft")
    LoraConfig.__bases__ = (*LoraConfig.__bases__, theirs.LoraConfig)
    # PEFT finds DoRA among the fields by what it noted of them.
    notes = {f.name: f.metadata for f in dataclasses.fields(theirs.LoraConfig)}
    for field in dataclasses.fields(LoraConfig):
        field.metadata = notes.get(field.name, field.metadata)
    if "config" in inspect.signature(theirs.layer.dispatch_default).parameters:
        # PEFT makes LoRA layers of modules by it; older PEFT keeps the config from it.
        LoraConfig._custom_modules = {nn.Module: _patched_layer}
    ours = (base for base in LoraModel.__bases__ if base is not nn.Module)
    LoraModel.__bases__ = (*ours, peft.PeftModel)
    for abstract in (layers.BaseTunerLayer, theirs.LoraLayer):
        abstract.register(LoraLayer)
    _load_onto_ours(peft)
    answer_for_peft()


def _patched_layer(target: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> Any:
    """Returns the LoRA layer that PEFT makes for a module, computing through fastlora."""
    from peft.tuners.lora import LoraModel as PeftTuner

    from fastlora.integrations.peft import patch_layer

    plain = copy.copy(config)  # with what PEFT has noted on it
    plain._custom_modules = None
    layer = PeftTuner._create_new_module(plain, adapter_name, target, **options)
    patch_layer(layer)
    return layer


def _load_onto_ours(peft: Any) -> None:
    """Has PEFT's model class load an adapter onto a model of ours through our own."""
    theirs = peft.PeftModel.from_pretrained.__func__

    @functools.wraps(theirs)
    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, LoraModel):
            return LoraModel.from_pretrained(model, *args, **kwargs)
        return theirs(cls, model, *args, **kwargs)

    peft.PeftModel.from_pretrained = classmethod(from_pretrained)


when_imported("peft", join_peft)
