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
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastlora.integrations.answers import answer_for_peft
from fastlora.integrations.when_imported import when_imported
from fastlora.layers import LoraLayer
from fastlora.model import LoraModel, adapter_state
from fastlora.model.base_state import base_state_dict, load_base_state_dict
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
        LoraConfig._custom_modules = PatchedLayers()  # older PEFT keeps the config from it
    ours = (base for base in LoraModel.__bases__ if base is not nn.Module)
    LoraModel.__bases__ = (*ours, peft.PeftModel)
    for abstract in (layers.BaseTunerLayer, theirs.LoraLayer):
        abstract.register(LoraLayer)
    _answer_for_peft(peft)
    answer_for_peft()


class PatchedLayers(Mapping[type, Any]):
    """Has PEFT make patched layers for a config of ours that is given to PEFT.

    It is what `LoraConfig._custom_modules` is in PEFT: a module class to what makes its LoRA layer.
    """

    def __getitem__(self, key: type) -> Any:
        if key is nn.Module:
            return _patched_layer
        raise KeyError(key)

    def __iter__(self) -> Iterator[type]:
        return iter((nn.Module,))

    def __len__(self) -> int:
        return 1


def _patched_layer(target: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> Any:
    """Returns the LoRA layer that PEFT makes for a module, computing through fastlora."""
    from peft.tuners.lora import LoraModel as PeftTuner

    from fastlora.integrations.peft import patch_layer

    plain = copy.copy(config)  # with what PEFT has noted on it
    plain._custom_modules = None
    layer = PeftTuner._create_new_module(plain, adapter_name, target, **options)
    patch_layer(layer)
    return layer


def _answer_for_peft(peft: Any) -> None:
    """Makes PEFT's state-dict functions, which accelerate calls by name, take our models too.

    They look for PEFT's layer classes, find none in a model of ours and say that it has no tensors:
    a sharded checkpoint of Trainer's would hold nothing.
    """
    save_and_load: Any = importlib.import_module("peft.utils.save_and_load")
    theirs_get = save_and_load.get_peft_model_state_dict
    theirs_set = save_and_load.set_peft_model_state_dict

    @functools.wraps(theirs_get)
    def get(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        ours = _inside(model)
        if ours is None:
            return theirs_get(model, state_dict, adapter_name, *args, **kwargs)
        # Of the outermost wrapper: FSDP gathers what it has split.
        source = model.state_dict() if state_dict is None else state_dict
        embeddings = kwargs.get("save_embedding_layers", "auto")
        return adapter_state.collect(ours, adapter_name, source, embeddings)

    @functools.wraps(theirs_set)
    def put(
        model: Any,
        peft_model_state_dict: Any,
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ours = _inside(model)
        if ours is None:
            return theirs_set(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        return adapter_state.put(ours, adapter_name, peft_model_state_dict)

    theirs_base: Any = getattr(save_and_load, "get_base_model_state_dict", None)
    theirs_set_base: Any = getattr(save_and_load, "set_base_model_state_dict", None)

    def base(model: Any) -> Any:
        ours = _inside(model)
        return theirs_base(model) if ours is None else base_state_dict(ours.get_base_model())

    def put_base(model: Any, state_dict: Any, strict: bool = True) -> Any:
        ours = _inside(model)
        if ours is None:
            return theirs_set_base(model, state_dict, strict)
        return load_base_state_dict(ours.get_base_model(), state_dict, strict)

    for module in (peft, peft.utils, save_and_load):
        module.get_peft_model_state_dict = get
        module.set_peft_model_state_dict = put
        if theirs_base is not None:
            module.get_base_model_state_dict = functools.wraps(theirs_base)(base)
            module.set_base_model_state_dict = functools.wraps(theirs_set_base)(put_base)
    loaded = peft.PeftModel.from_pretrained.__func__

    @functools.wraps(loaded)
    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, LoraModel):
            return LoraModel.from_pretrained(model, *args, **kwargs)
        return loaded(cls, model, *args, **kwargs)

    peft.PeftModel.from_pretrained = classmethod(from_pretrained)


def _inside(model: Any) -> LoraModel | None:
    """Returns the model of ours that torch.compile, FSDP1 or DDP wrap, or that it is; or None."""
    while model is not None and not isinstance(model, LoraModel):
        inner: Any = getattr(model, "_modules", {})
        names = ("_orig_mod", "_fsdp_wrapped_module", "module")
        model = next((inner[name] for name in names if name in inner), None)
    return model


when_imported("peft", join_peft)
