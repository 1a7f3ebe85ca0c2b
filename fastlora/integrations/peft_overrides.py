"""Replace functions of PEFT with versions that also accept fastlora models.

PEFT's own functions look up PEFT's layer classes by name, or write state to attributes that a
fastlora model does not read. For example, accelerate saves a sharded Trainer checkpoint through
these functions, and the checkpoint of a fastlora model would be empty. After PEFT is imported, each
replaced function calls fastlora's implementation if it is given a fastlora model, and PEFT's
original implementation otherwise.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.integrations.import_hooks import call_when_imported
from fastlora.layers import LoraLayer
from fastlora.model import LoraModel, adapter_state, hotswap, reduce, status
from fastlora.model.base_state import base_state_dict, load_base_state_dict
from fastlora.optimizers import create_loraplus_optimizer


def find_wrapped_fastlora_model(possibly_wrapped_model: object) -> Any:
    """Return fastlora's `LoraModel` inside a possibly wrapped model.

    A wrapper is recognized by the name of the attribute that contains the model, as in the wrappers
    of torch.compile, FSDP1, and DDP. A `LoraModel` without a wrapper is returned unchanged. The
    result is None if there is no `LoraModel`.
    """
    while possibly_wrapped_model is not None and not isinstance(possibly_wrapped_model, LoraModel):
        inner: Any = getattr(possibly_wrapped_model, "_modules", {})
        names = ("_orig_mod", "_fsdp_wrapped_module", "module")
        possibly_wrapped_model = next((inner[name] for name in names if name in inner), None)
    return possibly_wrapped_model


def has_fastlora_layers(possible_model: object) -> bool:
    """Return whether an object is a model with fastlora's LoRA layers.

    The result is True for any `LoraModel`, and for any other module that is or contains such a
    layer. The object may be compiled with `torch.compile`.
    """
    model = getattr(possible_model, "_orig_mod", possible_model)
    if not isinstance(model, nn.Module) or isinstance(model, LoraModel):
        return isinstance(model, LoraModel)
    return any(isinstance(module, LoraLayer) for module in model.modules())


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    *_: Any,
    save_embedding_layers: bool | str = "auto",
    **__: Any,
) -> dict[str, torch.Tensor]:
    """Return the state dict of one adapter, like PEFT's function of the same name.

    This function replaces PEFT's function for fastlora's models. The keys of the state dict have
    the names that PEFT's adapter files use.
    """
    # Read the outermost wrapper's state, because FSDP gathers its shards there.
    source = model.state_dict() if state_dict is None else state_dict
    return adapter_state.adapter_file_state_dict(
        find_wrapped_fastlora_model(model), adapter_name, source, save_embedding_layers
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    *_: Any,
    **__: Any,
) -> _IncompatibleKeys:
    """Load an adapter's state dict into a model.

    The tensors are copied into the parameters of the adapter, which belongs to a `LoraModel`. The
    keys of ``peft_model_state_dict`` are those of PEFT's adapter files. The function returns the
    missing and unexpected keys. See `adapter_state.set_adapter_tensors`.
    """
    return adapter_state.set_adapter_tensors(
        find_wrapped_fastlora_model(model), adapter_name, peft_model_state_dict
    )


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base model's state dict.

    Its keys are the same as in a model without adapters.
    """
    return base_state_dict(find_wrapped_fastlora_model(model).get_base_model())


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load a state dict into the base model of a model with adapters.

    The keys of the state dict are those of the base model without adapters. The tensors are copied.
    Returns the missing and unexpected keys. See `load_base_state_dict`. This function overrides
    PEFT's function of the same name for fastlora's models.
    """
    return load_base_state_dict(
        find_wrapped_fastlora_model(model).get_base_model(), state_dict, strict
    )


# PEFT's module, the predicate that recognizes a fastlora model among the arguments, and the
# functions that replace those with the same names in that module.
PEFT_OVERRIDES: tuple[tuple[str, Callable[[Any], Any], tuple[Callable[..., Any], ...]], ...] = (
    (
        "peft.utils.save_and_load",
        find_wrapped_fastlora_model,
        (
            get_peft_model_state_dict,
            set_peft_model_state_dict,
            get_base_model_state_dict,
            set_base_model_state_dict,
        ),
    ),
    (
        "peft.utils.hotswap",
        has_fastlora_layers,
        (
            hotswap.hotswap_adapter,
            hotswap.hotswap_adapter_from_state_dict,
            hotswap.prepare_model_for_compiled_hotswap,
        ),
    ),
    (
        "peft.tuners.lora.conversion",
        has_fastlora_layers,
        (reduce.convert_to_lora, reduce.save_as_lora),
    ),
    ("peft.tuners.lora.intruders", has_fastlora_layers, (reduce.reduce_intruder_dimension,)),
    ("peft.optimizers", has_fastlora_layers, (create_loraplus_optimizer,)),
    ("peft.peft_model", has_fastlora_layers, (status.get_layer_status, status.get_model_status)),
)


def override_peft_functions() -> None:
    """Override PEFT functions with versions that also accept fastlora models.

    For any other model, an overridden function calls PEFT's original function. `PEFT_OVERRIDES`
    lists the functions. If a PEFT module is not imported yet, its functions are overridden when the
    module is imported.
    """
    for module, is_fastlora, functions in PEFT_OVERRIDES:
        call_when_imported(
            module, functools.partial(_override_functions, module, is_fastlora, functions)
        )


def _override_functions(
    module: str, is_fastlora: Callable[[Any], Any], functions: tuple[Callable[..., Any], ...]
) -> None:
    there = importlib.import_module(module)
    for ours in functions:
        theirs = getattr(there, ours.__name__, None)
        if theirs is None:
            continue  # older PEFT has no function for the base model's tensors
        function = _dispatch_by_any_argument(is_fastlora, ours, theirs)
        # Replace it in every PEFT module that has imported it.
        for name, holder in list(sys.modules.items()):
            if name.partition(".")[0] == "peft" and vars(holder).get(ours.__name__) is theirs:
                setattr(holder, ours.__name__, function)


def _dispatch_by_any_argument(
    is_fastlora: Callable[[Any], Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that calls ``ours`` for fastlora models and ``theirs`` otherwise.

    The function calls ``ours`` if ``is_fastlora`` is true for any of the arguments.
    """

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        mine = any(map(is_fastlora, (*args, *kwargs.values())))
        return (ours if mine else theirs)(*args, **kwargs)

    return function
