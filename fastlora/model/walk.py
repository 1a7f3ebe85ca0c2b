"""Walks over a model with adapters that see its base modules, and nothing that adapters own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastlora.layers import LoraLayer

# What torch.compile, FSDP1 and activation checkpointing put into the names of what they wrap.
_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


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
) -> Iterator[tuple[str, nn.Module]]:
    """Yields what ``named_modules()`` does, but nothing inside a LoRA layer or a wrapper.

    Both themselves are yielded; what a wrapper is says `is_wrapper`. So a model with many adapters
    takes no longer to walk than one with none, and what one adapter owns is never found for
    another. ``inner_layers`` has LoRA layers follow that lie inside others of ours and share their
    adapters (`LoraLayer.inner_layers`).
    """
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if remove_duplicate:
            if module in seen:
                return
            seen.add(module)
        yield name, module
        if is_lora_layer(module):
            # What a layer was made from, and is known by under another name too, lies inside it.
            inside = [module._modules.get("base_layer"), *module.__dict__.get("_linear", ())]
            seen.update(m for part in inside if part is not None for m in part.modules())
            inner: Any = getattr(module, "inner_layers", None) if inner_layers else None
            if inner is not None:
                for below, layer in inner().items():
                    yield f"{name}.{below}", layer
        elif is_wrapper(module):
            seen.update(original_of(module).modules())
        else:
            for child_name, child in module._modules.items():
                if child is not None:
                    yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


def base_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields `outer_modules`, and what wrappers wrap, under the names that the base model has.

    The last of each three says whether the module is a wrapper, or inside the original of one.
    """
    for name, module in outer_modules(model, remove_duplicate=remove_duplicate):
        wraps = is_wrapper(module)
        yield name, module, wraps
        if wraps:
            original = original_of(module)
            for inner, part in original.named_modules(remove_duplicate=remove_duplicate):
                if inner:
                    yield f"{name}.{inner}", part, True


def peft_function(model: nn.Module, module: str, name: str, refusal: Exception) -> Any:
    """Returns a function of PEFT's for a model with layers of PEFT's; raises ``refusal`` else."""
    layers: Any = sys.modules.get("peft.tuners.tuners_utils")
    kind = () if layers is None else layers.BaseTunerLayer
    # Ours are PEFT's too, by registration.
    if any(isinstance(m, kind) and not isinstance(m, LoraLayer) for m in model.modules()):
        return getattr(importlib.import_module(module), name)
    raise refusal
