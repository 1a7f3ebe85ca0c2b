"""Walks over a model with adapters that see its base modules, and nothing that adapters own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def is_lora_layer(module: nn.Module) -> bool:
    """Returns whether ``module`` holds LoRA factors, be it fastlora's or PEFT's."""
    return hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A")


def holds_copies(module: nn.Module) -> bool:
    """Returns whether ``module`` wraps one that adapters own copies of, fastlora's or PEFT's."""
    return "original_module" in module._modules and "modules_to_save" in module._modules


def original_of(module: nn.Module) -> nn.Module:
    """Returns what a wrapper wraps; any other module as it is."""
    original = module._modules["original_module"] if holds_copies(module) else module
    return module if original is None else original


def outer_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yields what ``named_modules()`` does, but nothing inside a LoRA layer or a wrapper.

    Both themselves are yielded; a wrapper is what holds adapters' copies of a module
    (`holds_copies`). So a model with many adapters takes no longer to walk than one with none, and
    what one adapter owns is never found for another.
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
        elif holds_copies(module):
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
        wraps = holds_copies(module)
        yield name, module, wraps
        if wraps:
            original = original_of(module)
            for inner, part in original.named_modules(remove_duplicate=remove_duplicate):
                if inner:
                    yield f"{name}.{inner}", part, True
