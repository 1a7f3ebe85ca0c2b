"""Which tensors of a model belong to an adapter, and what PEFT's files call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.config import LoraConfig
from fastlora.inject import Plan
from fastlora.layers import FastLoraLinear, LoraLayer, ModulesToSaveWrapper
from fastlora.layers.wrapped import linear_features
from fastlora.validation import CheckpointError

# What PEFT puts before a module's name, in files and in memory.
PREFIX = "base_model.model."


def key_map(lora_model: Any, adapter_name: str) -> dict[str, str]:
    """Returns the file key of each tensor of an adapter, and its name in ``state_dict()``.

    In a file the adapter's name is left out, a copied module has its own name, and the bias of an
    adapted layer is its ``base_layer.bias``.
    """
    model, config = lora_model.get_base_model(), lora_model.peft_config[adapter_name]
    keys: dict[str, str] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        at = f"{PREFIX}{name}."
        if isinstance(module, LoraLayer):
            inside.append(f"{name}.")
            if adapter_name in module.lora_A:
                for factor in ("lora_A", "lora_B"):
                    keys[f"{at}{factor}.weight"] = f"{at}{factor}.{adapter_name}.weight"
                if module.lora_B[adapter_name].bias is not None:
                    keys[f"{at}lora_B.bias"] = f"{at}lora_B.{adapter_name}.bias"
            base_bias = getattr(module.get_base_layer(), "bias", None)
            if base_bias is not None and config.bias != "none":
                own = isinstance(module, FastLoraLinear)
                keys[f"{at}base_layer.bias"] = f"{at}bias" if own else f"{at}base_layer.bias"
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(f"{name}.")
            if adapter_name in module.modules_to_save:
                for key in module.modules_to_save[adapter_name].state_dict():
                    keys[f"{at}{key}"] = f"{at}modules_to_save.{adapter_name}.{key}"
    if config.bias == "all":
        for name, _ in model.named_parameters():
            if name.endswith("bias") and not name.startswith(tuple(inside)):
                keys[f"{PREFIX}{name}"] = f"{PREFIX}{name}"
    return keys


def check_fit(
    model: nn.Module,
    plan: Plan,
    config: LoraConfig,
    tensors: dict[str, torch.Tensor],
    path: Path,
    adapter_name: str | None = None,
) -> None:
    """Raises `CheckpointError` unless a file's tensors are what the plan needs, shape by shape.

    Args:
        model: The base model, with or without adapters.
        plan: What the file's config touches in it.
        config: The file's config.
        tensors: By file key.
        path: The folder, for messages.
        adapter_name: Where given and the model has it already, its ranks must be the file's.
    """
    expected = _expected_shapes(model, plan, config)
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors that this model needs, the first {missing[0]!r}"
        )
    optional = _optional_shapes(model, plan, config)
    for key, tensor in tensors.items():
        shape = expected.get(key, optional.get(key))
        if shape is None:
            raise CheckpointError(
                f"{path} has a tensor {key!r} for which this model has no place"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {tuple(tensor.shape)}, this model expects {shape}"
            )
    for name in plan.targets if adapter_name is not None else ():
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            r = layer.r[adapter_name]
            if r != config.rank_for(name):
                raise CheckpointError(
                    f"{path}: rank {config.rank_for(name)} on {name}, where the loaded adapter "
                    f"{adapter_name!r} has {r}; load it under another name"
                )


def _expected_shapes(
    model: nn.Module, plan: Plan, config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in plan.targets:
        module, r = model.get_submodule(name), config.rank_for(name)
        features = linear_features(module)
        if features is None:
            continue
        k, n = features
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (r, k)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (n, r)
        if config.lora_bias:
            shapes[f"{PREFIX}{name}.lora_B.bias"] = (n,)
    for name in plan.modules_to_save:
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        for key, tensor in module.state_dict().items():
            shapes[f"{PREFIX}{name}.{key}"] = tuple(tensor.shape)
    return shapes


def _optional_shapes(
    model: nn.Module, plan: Plan, config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Trained biases: their place in a file depends on the config, and PEFT leaves some out."""
    if config.bias == "none":
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in plan.targets:
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if getattr(base, "bias", None) is not None:
            shapes[f"{PREFIX}{name}.base_layer.bias"] = tuple(base.bias.shape)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                shapes[f"{PREFIX}{name}"] = tuple(parameter.shape)
    return shapes


@torch.no_grad()
def load(lora_model: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checked file's tensors into an adapter's parameters, in their own dtypes."""
    state = lora_model.state_dict()
    for disk, key in key_map(lora_model, adapter_name).items():
        if disk in tensors:
            state[key].copy_(tensors[disk])
