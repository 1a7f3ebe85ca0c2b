"""Get and load the base model's state dict, with the keys of the model without adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.layers import FastLoraLinear, LoraLayer
from fastlora.layers.module_wrapper import ModuleWrapper
from fastlora.layers.trainable_tokens import TrainableTokensLayer
from fastlora.sharding import copy_full_tensor_

# Attributes under which LoRA layers and wrappers hold the module that they wrap.
_INNER = ("base_layer", "original_module", "token_adapter")


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base model's state dict.

    The keys are the same as in a model without adapters.
    """
    named = (
        (key_without_adapters(model, key), tensor) for key, tensor in model.state_dict().items()
    )
    return {bare: tensor for bare, tensor in named if bare is not None}


@torch.no_grad()
def load_base_state_dict(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], strict: bool = True
) -> Any:
    """Load the base model's state dict.

    The model may have adapters, but the keys are those of the model without adapters. The tensors
    are copied.

    Args:
        model: The base model, with or without adapters.
        tensors: A mapping from the keys of the model without adapters to tensors.
        strict: Whether to raise an error if keys are missing or unexpected.

    Returns:
        A named tuple with ``missing_keys`` and ``unexpected_keys``, as in the result of
        `nn.Module.load_state_dict`.

    Raises:
        RuntimeError: If a shape differs, or if ``strict`` is True and a key is missing or
            unexpected. No tensor has been changed in this case.
    """
    entries = base_state_dict(model)
    missing = [key for key in entries if key not in tensors]
    unexpected = [key for key in tensors if key not in entries]
    problems = []
    if strict and missing:
        problems.append(f"Missing key(s): {', '.join(missing)}")
    if strict and unexpected:
        problems.append(f"Unexpected key(s): {', '.join(unexpected)}")
    for key, own in entries.items():
        if key in tensors and tensors[key].shape != own.shape:
            found, expected = tuple(tensors[key].shape), tuple(own.shape)
            problems.append(f"size mismatch for {key}: got {found}, expected {expected}")
    if problems:
        raise RuntimeError(f"cannot load the base model's state dict: {'; '.join(problems)}")
    for key, own in entries.items():
        if key in tensors:
            copy_full_tensor_(own, tensors[key])
    return _IncompatibleKeys(missing, unexpected)


def key_without_adapters(model: nn.Module, key: str, adapter_name: str | None = None) -> str | None:
    """Return the key that a tensor would have in a model without adapters.

    Args:
        model: The base model, with or without adapters.
        key: A key of the model's ``state_dict()``.
        adapter_name: The name of an adapter. If it is given, the result is instead the key that the
            tensor would have in a PEFT model with only this adapter.

    Returns:
        The key, or None if the tensor belongs to an adapter.
    """
    module: nn.Module | None = model
    parts: list[str] = []
    for part in key.split("."):
        if module is None:
            parts.append(part)
            continue
        adapted = isinstance(module, (LoraLayer, ModuleWrapper, TrainableTokensLayer))
        holds = adapted and adapter_name in _adapter_names(module)
        inside = part in module._modules
        if adapted and inside and part not in _INNER:
            return None
        if isinstance(module, FastLoraLinear) and holds:
            parts.append("base_layer")
        if not (adapted and part in _INNER) or holds:
            parts.append(part)
        module = module._modules.get(part)
    return ".".join(parts)


def strip_adapter_wrapper_names(module: str) -> str:
    """Remove the names of adapter wrappers from a module name.

    The name is that of a base module in an adapter file. The result is the module's name in the
    model without adapters.
    """
    return ".".join(part for part in module.split(".") if part not in _INNER)


def _adapter_names(module: Any) -> Collection[str]:
    if isinstance(module, LoraLayer):
        return module.r
    return (
        module.token_indices if isinstance(module, TrainableTokensLayer) else module.adapter_names
    )
