"""PEFT's functions by name, which take models of ours once PEFT is imported.

They look for PEFT's layer classes by name, or write where nothing of ours sees it. Given a model of
ours, each now calls the function of ours that does the same; any other model goes where it went.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastlora.integrations.when_imported import when_imported
from fastlora.layers import LoraLayer
from fastlora.model import LoraModel, hotswap, reduce, status
from fastlora.optimizers import create_loraplus_optimizer

# Module of PEFT's to functions of ours that are called as those there.
ANSWERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "peft.utils.hotswap": (
        hotswap.hotswap_adapter,
        hotswap.hotswap_adapter_from_state_dict,
        hotswap.prepare_model_for_compiled_hotswap,
    ),
    "peft.tuners.lora.conversion": (reduce.convert_to_lora, reduce.save_as_lora),
    "peft.tuners.lora.intruders": (reduce.reduce_intruder_dimension,),
    "peft.optimizers": (create_loraplus_optimizer,),
    "peft.peft_model": (status.get_layer_status, status.get_model_status),
}


def answer_for_peft() -> None:
    """Has these functions take our models: at once, or once their module is imported."""
    for module, functions in ANSWERS.items():
        when_imported(module, functools.partial(_answer, module, functions))


def _answer(module: str, functions: tuple[Callable[..., Any], ...]) -> None:
    there = importlib.import_module(module)
    for ours in functions:
        theirs = getattr(there, ours.__name__)
        function = _either(ours, theirs)
        # Wherever PEFT has handed the function on to.
        for name, holder in list(sys.modules.items()):
            if name.partition(".")[0] == "peft" and vars(holder).get(ours.__name__) is theirs:
                setattr(holder, ours.__name__, function)


def _either(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls ours for a model of ours, and theirs for any other."""

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        mine = any(map(_is_ours, (*args, *kwargs.values())))
        return (ours if mine else theirs)(*args, **kwargs)

    return function


def _is_ours(argument: object) -> bool:
    """Whether an argument is a model with layers of ours, compiled or wrapped by nobody too."""
    model = getattr(argument, "_orig_mod", argument)
    if not isinstance(model, nn.Module) or isinstance(model, LoraModel):
        return isinstance(model, LoraModel)
    return any(isinstance(module, LoraLayer) for module in model.modules())
