"""PEFT's functions by name, which take models of ours once PEFT is imported.

They look for PEFT's layer classes by name, or write where nothing of ours sees it: a sharded
checkpoint of Trainer's, which accelerate writes through them, would hold nothing. Given a model of
ours, each now calls the function of ours that does the same; any other model goes where it went.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.integrations.when_imported import when_imported
from fastlora.layers import LoraLayer
from fastlora.model import LoraModel, adapter_state, hotswap, reduce, status
from fastlora.model.base_state import base_state_dict, load_base_state_dict
from fastlora.optimizers import create_loraplus_optimizer


def model_inside(model: object) -> Any:
    """Returns the model of ours that torch.compile, FSDP1 or DDP wrap, or that it is; or None."""
    while model is not None and not isinstance(model, LoraModel):
        inner: Any = getattr(model, "_modules", {})
        names = ("_orig_mod", "_fsdp_wrapped_module", "module")
        model = next((inner[name] for name in names if name in inner), None)
    return model


def has_layers(argument: object) -> bool:
    """Whether an argument is a model with layers of ours, compiled or wrapped by nobody too."""
    model = getattr(argument, "_orig_mod", argument)
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
    """Returns an adapter's tensors by file key."""
    # Of the outermost wrapper: FSDP gathers what it has split.
    source = model.state_dict() if state_dict is None else state_dict
    return adapter_state.collect(model_inside(model), adapter_name, source, save_embedding_layers)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    *_: Any,
    **__: Any,
) -> Any:
    """Copies tensors by file key into an adapter; see `adapter_state.put`."""
    return adapter_state.put(model_inside(model), adapter_name, peft_model_state_dict)


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the base model's tensors by the keys that it has without adapters."""
    return base_state_dict(model_inside(model).get_base_model())


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> Any:
    """Copies tensors into the base model; see `load_base_state_dict`."""
    return load_base_state_dict(model_inside(model).get_base_model(), state_dict, strict)


# Module of PEFT's, what says that an argument is ours, and functions that are called as there.
ANSWERS: tuple[tuple[str, Callable[[Any], Any], tuple[Callable[..., Any], ...]], ...] = (
    (
        "peft.utils.save_and_load",
        model_inside,
        (
            get_peft_model_state_dict,
            set_peft_model_state_dict,
            get_base_model_state_dict,
            set_base_model_state_dict,
        ),
    ),
    (
        "peft.utils.hotswap",
        has_layers,
        (
            hotswap.hotswap_adapter,
            hotswap.hotswap_adapter_from_state_dict,
            hotswap.prepare_model_for_compiled_hotswap,
        ),
    ),
    ("peft.tuners.lora.conversion", has_layers, (reduce.convert_to_lora, reduce.save_as_lora)),
    ("peft.tuners.lora.intruders", has_layers, (reduce.reduce_intruder_dimension,)),
    ("peft.optimizers", has_layers, (create_loraplus_optimizer,)),
    ("peft.peft_model", has_layers, (status.get_layer_status, status.get_model_status)),
)


def answer_for_peft() -> None:
    """Has these functions take our models: at once, or once their module is imported."""
    for module, takes, functions in ANSWERS:
        when_imported(module, functools.partial(_answer, module, takes, functions))


def _answer(
    module: str, takes: Callable[[Any], Any], functions: tuple[Callable[..., Any], ...]
) -> None:
    there = importlib.import_module(module)
    for ours in functions:
        theirs = getattr(there, ours.__name__, None)
        if theirs is None:
            continue  # older PEFT has no function for the base model's tensors
        function = _either(takes, ours, theirs)
        # Wherever PEFT has handed the function on to.
        for name, holder in list(sys.modules.items()):
            if name.partition(".")[0] == "peft" and vars(holder).get(ours.__name__) is theirs:
                setattr(holder, ours.__name__, function)


def _either(
    takes: Callable[[Any], Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a function that calls ours for a model of ours, and theirs for any other."""

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        mine = any(map(takes, (*args, *kwargs.values())))
        return (ours if mine else theirs)(*args, **kwargs)

    return function
