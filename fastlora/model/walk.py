"""Walks over a model with adapters that see its base modules, and nothing that adapters own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from fastlora.layers import LoraLayer

# What torch.compile, FSDP1 and activation checkpointing put into the names of what they wrap.
_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


# Name and module of each module of a base model, and whether adapters own a version of it.
BaseModules = list[tuple[str, nn.Module, bool]]


def plain_name(name: str) -> str:
    """Returns a module's or a tensor's name without those of wrappers around its parents."""
    for wrapped in _WRAPPED:
        name = name.replace(wrapped, "")
    return name


def is_lora_layer(module: nn.Module) -> bool:
    """Returns whether ``module`` holds LoRA factors, be it fastlora's or PEFT's."""
    return hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A")


def holds_copies(module: nn.Module) -> bool:
    """Returns whether ``module`` wraps one that adapters own copies of, fastlora's or PEFT's."""
    return "original_module" in module._modules and "modules_to_save" in module._modules


def holds_tokens(module: nn.Module) -> bool:
    """Returns whether ``module`` wraps one that adapters train rows of, fastlora's or PEFT's."""
    return "token_adapter" in module._modules


def is_wrapper(module: nn.Module) -> bool:
    """Returns whether ``module`` stands for one that adapters train otherwise than by LoRA."""
    return holds_copies(module) or holds_tokens(module)


def original_of(module: nn.Module) -> nn.Module:
    """Returns what a wrapper wraps; any other module as it is."""
    original: nn.Module | None = module
    if not module._modules:
        return module
    if holds_tokens(module):
        original = module.get_submodule("token_adapter.base_layer")
    elif holds_copies(module):
        original = module._modules["original_module"]
    return module if original is None else original


def base_of(module: nn.Module) -> nn.Module:
    """Returns what a LoRA layer or a wrapper was made around; any other module as it is."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else original_of(module)


def outer_modules(
    model: nn.Module, *, remove_duplicate: bool = True, inner_layers: bool = False
) -> list[tuple[str, nn.Module]]:
    """Returns what ``named_modules()`` yields, but nothing inside a LoRA layer or a wrapper.

    Both themselves are among it; what a wrapper is says `is_wrapper`. So a model with many adapters
    takes no longer to walk than one with none, and what one adapter owns is never found for
    another. ``inner_layers`` has LoRA layers follow that lie inside others of ours and share their
    adapters (`LoraLayer.inner_layers`).
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    ahead = [("", model)]  # the next one last
    while ahead:
        name, module = ahead.pop()
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        found.append((name, module))
        if not module._modules:
            continue  # nothing lies inside
        if is_lora_layer(module):
            # What a layer was made from, and is known by under another name too, lies inside it.
            for part in (module._modules.get("base_layer"), *module.__dict__.get("_linear", ())):
                if part is not None:
                    seen.update(part.modules())
            inner: Any = getattr(module, "inner_layers", None) if inner_layers else None
            if inner is not None:
                for below, layer in inner().items():
                    found.append((f"{name}.{below}", layer))
        elif is_wrapper(module):
            seen.update(original_of(module).modules())
        else:
            for child_name, child in reversed(module._modules.items()):
                if child is not None:
                    ahead.append((f"{name}.{child_name}" if name else child_name, child))
    return found


def base_modules(model: nn.Module, *, remove_duplicate: bool = True) -> BaseModules:
    """Returns `outer_modules`, and what wrappers wrap, under the names that the base model has.

    The last of each three says whether the module is a wrapper, or inside the original of one.
    """
    found: BaseModules = []
    for name, module in outer_modules(model, remove_duplicate=remove_duplicate):
        wraps = bool(module._modules) and is_wrapper(module)
        found.append((name, module, wraps))
        if wraps:
            original = original_of(module)
            for inner, part in original.named_modules(remove_duplicate=remove_duplicate):
                if inner:
                    found.append((f"{name}.{inner}", part, True))
    return found


def peft_function(model: nn.Module, module: str, name: str, refusal: Exception) -> Any:
    """Returns a function of PEFT's for a model with layers of PEFT's; raises ``refusal`` else."""
    layers: Any = sys.modules.get("peft.tuners.tuners_utils")
    kind = () if layers is None else layers.BaseTunerLayer
    # Ours are PEFT's too, by registration.
    if any(isinstance(m, kind) and not isinstance(m, LoraLayer) for m in model.modules()):
        return getattr(importlib.import_module(module), name)
    raise refusal
