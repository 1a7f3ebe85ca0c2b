"""Iterate over the base modules of a model with adapters, without the modules of the adapters."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastlora.layers import LoraLayer, ModuleWrapper
from fastlora.layers.base_layers import fallback_reason_hooked
from fastlora.sharding import is_dtensor, is_fsdp2_module

# Name components that torch.compile, FSDP1, and activation checkpointing add when they wrap a
# module. See `strip_wrapper_prefixes`.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPER_PREFIX = re.compile(r"\.(?:{0})(?=\.|$)|^(?:(?:{0})\.)+".format("|".join(_WRAPPERS)))


# For each module of a base model: the name, the module, and whether it is, or is inside, a module
# that adapters own a copy of or train rows of.
ModulesWithOriginalNames = list[tuple[str, nn.Module, bool]]


def strip_wrapper_prefixes(name: str) -> str:
    """Remove the prefixes of wrapper modules from the name of a module or tensor.

    The prefixes of ``torch.compile``, FSDP1, and activation checkpointing are removed wherever they
    occur in the name, also at its end.
    """
    return WRAPPER_PREFIX.sub("", name)


def strip_wrapper_prefixes_from_names(names: Iterable[str]) -> list[str]:
    """Return a list of names without wrapper prefixes. See `strip_wrapper_prefixes`.

    A name that equals an earlier name without the prefixes keeps them. It is the name of a module
    whose wrapper is itself in the list.
    """
    bare_names: dict[str, None] = {}
    for name in names:
        bare = WRAPPER_PREFIX.sub("", name)
        bare_names[name if bare in bare_names else bare] = None
    return list(bare_names)


def strip_wrapper_prefixes_from_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Strip the prefixes of wrapper modules from the keys of a state dict.

    The result is a new dict with the same tensors. See `strip_wrapper_prefixes` for the
    wrappers.
    """
    return {WRAPPER_PREFIX.sub("", key): tensor for key, tensor in state.items()}


def is_lora_layer(module: nn.Module) -> bool:
    """Return whether ``module`` is a LoRA layer.

    The function also recognizes the LoRA layers of PEFT.
    """
    # A wrapper, such as that of activation checkpointing, forwards the layer's attributes.
    return "lora_A" in module._modules or "lora_embedding_A" in module._modules


def is_modules_to_save_wrapper(module: nn.Module) -> bool:
    """Return whether ``module`` is a ``modules_to_save`` wrapper.

    The wrappers of fastlora and of PEFT are recognized.
    """
    return "original_module" in module._modules and "modules_to_save" in module._modules


def is_trainable_tokens_wrapper(module: nn.Module) -> bool:
    """Return whether ``module`` is a wrapper for trainable tokens.

    Such a wrapper, of fastlora or of PEFT, is used for ``trainable_token_indices``.
    """
    return "token_adapter" in module._modules


def is_auxiliary_wrapper(module: nn.Module) -> bool:
    """Return whether ``module`` is a ``modules_to_save`` or ``trainable_token_indices`` wrapper.

    In PEFT, the base class of these wrappers is ``AuxiliaryTrainingWrapper``.
    """
    return is_modules_to_save_wrapper(module) or is_trainable_tokens_wrapper(module)


def unwrap_auxiliary_wrapper(module: nn.Module) -> nn.Module:
    """Return the original module inside an auxiliary wrapper.

    A module that is not an auxiliary wrapper (see `is_auxiliary_wrapper`), for example a LoRA
    layer, is returned unchanged.
    """
    original: nn.Module | None = module
    if not module._modules:
        return module
    if is_trainable_tokens_wrapper(module):
        original = module.get_submodule("token_adapter.base_layer")
    elif is_modules_to_save_wrapper(module):
        original = module._modules["original_module"]
    return module if original is None else original


def base_module_of(module: nn.Module) -> nn.Module:
    """Return the base module of a LoRA layer or wrapper.

    Any other module is returned unchanged.
    """
    return (
        module.get_base_layer()
        if isinstance(module, LoraLayer)
        else unwrap_auxiliary_wrapper(module)
    )


def is_lora_layer_in_use(module: nn.Module) -> bool:
    """Return whether ``module`` is a LoRA layer that `is_replaceable` does not accept."""
    return isinstance(module, LoraLayer) and not is_replaceable(module)


def is_replaceable(module: LoraLayer | ModuleWrapper) -> bool:
    """Return whether a LoRA layer or wrapper can be replaced with its base module.

    Its adapters must all have been deleted. It must not have hooks, such as those of `fully_shard`,
    and its parameters must not be sharded.
    """
    return not (
        module._all_available_adapter_names()
        or fallback_reason_hooked(module)
        or is_fsdp2_module(module)
        or any(map(is_dtensor, module.parameters()))
    )


def named_modules_outside_adapters(
    model: nn.Module, *, remove_duplicate: bool = True, include_inner_lora_layers: bool = False
) -> list[tuple[str, nn.Module]]:
    """Return the named modules of a model, except those inside modules with adapters.

    Modules with adapters are LoRA layers and auxiliary wrappers (see `is_auxiliary_wrapper`). These
    modules themselves are included. Of the modules inside them, only inner LoRA layers can be
    included. The result is a list of tuples ``(name, module)``, in the order of
    ``named_modules()``. The running time does not depend on the number of adapters.

    Args:
        model: The model, with or without adapters.
        remove_duplicate: Whether to return a module with several names only once.
        include_inner_lora_layers: Whether to include LoRA layers that are part of other LoRA
            layers. See `LoraLayer.inner_layers`.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    ahead = [("", model)]  # a stack: the next module is the last element
    while ahead:
        name, module = ahead.pop()
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        found.append((name, module))
        if not module._modules:
            continue  # no child modules
        if is_lora_layer(module):
            # The module that the layer was created from is inside the layer, and may also have
            # another name in the model.
            for part in (module._modules.get("base_layer"), *module.__dict__.get("_linear", ())):
                if part is not None:
                    seen.update(part.modules())
            inner: Any = (
                getattr(module, "inner_layers", None) if include_inner_lora_layers else None
            )
            if inner is not None:
                for below, layer in inner().items():
                    found.append((f"{name}.{below}", layer))
        elif is_auxiliary_wrapper(module):
            seen.update(unwrap_auxiliary_wrapper(module).modules())
        else:
            for child_name, child in reversed(module._modules.items()):
                if child is not None:
                    ahead.append((f"{name}.{child_name}" if name else child_name, child))
    return found


def modules_with_original_names(
    model: nn.Module, *, remove_duplicate: bool = True
) -> ModulesWithOriginalNames:
    """Return the modules of a model with their original names.

    The original names are those in the base model without adapters. Modules that belong to an
    adapter are left out. A LoRA layer or wrapper is listed in place of the module that it replaced,
    under the name of that module. The modules inside wrapped modules are included in addition to
    those that `named_modules_outside_adapters` returns. A wrapper of a LoRA layer, such as that of
    ``torch.compile``, is left out, because the LoRA layer stands for it.

    Returns:
        A list of tuples ``(name, module, wrapped)``. ``wrapped`` is True if the module is a wrapper
        or is inside a wrapped module.
    """
    found: ModulesWithOriginalNames = []
    for name, module in named_modules_outside_adapters(model, remove_duplicate=remove_duplicate):
        wraps = bool(module._modules) and is_auxiliary_wrapper(module)
        is_wrapper = not _WRAPPERS.isdisjoint(module._modules)
        if name and is_wrapper and any(map(is_lora_layer, module.children())):
            continue
        found.append((name, module, wraps))
        if wraps:
            original = unwrap_auxiliary_wrapper(module)
            for inner, part in original.named_modules(remove_duplicate=remove_duplicate):
                if inner:
                    found.append((f"{name}.{inner}", part, True))
    return found


def copy_sharing_parameters(module: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of a module that shares the parameters of the original.

    The copy also shares the buffers and the hooks of the original, and it refers to the same other
    modules of ``model``. LoRA layers inside the module are replaced with their base layers in the
    copy.
    """
    inside = {*module.modules()}
    shared: list[object] = [*module.parameters(), *module.buffers()]
    shared += (other for other in model.modules() if other not in inside)
    for name, hooks in vars(module).items():
        if name.endswith("_hooks"):
            shared += hooks.values()
    bases = {id(m): m.get_base_layer() for m in inside if isinstance(m, LoraLayer)}
    return copy.deepcopy(module, {id(part): part for part in shared} | bases)


def peft_function_or_raise(
    model: nn.Module, python_module: str, function_name: str, no_peft_layers_error: Exception
) -> Any:
    """Return the named PEFT function, or raise an error if the model has no PEFT adapter layers.

    Args:
        model: The model.
        python_module: The name of the Python module that defines the function.
        function_name: The name of the function.
        no_peft_layers_error: The error to raise if the model has no PEFT adapter layers.
    """
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    # The layers of fastlora are registered as virtual subclasses of BaseTunerLayer.
    if any(isinstance(m, kind) and not isinstance(m, LoraLayer) for m in model.modules()):
        return getattr(importlib.import_module(python_module), function_name)
    raise no_peft_layers_error
