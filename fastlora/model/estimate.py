"""`estimate`: how large an adapter will be, and what training it holds in memory.

From shapes alone: works on a model on the meta device, allocates nothing and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.layers import LoraLayer, ModulesToSaveWrapper
from fastlora.layers.wrapped import linear_features
from fastlora.model import inject
from fastlora.model.config import LoraConfig
from fastlora.model.tuner import resolve_config

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Estimate:
    """The size of an adapter, and of what one of its training steps keeps beside activations.

    Attributes:
        adapter_parameters: Trainable parameters: the adapter's, and the biases of the base model
            that its config trains.
        base_parameters: Of the model without adapters; a weight that is tied counts once.
        modules: How many modules the adapter adapts.
        weight_bytes: Of the trainable parameters.
        gradient_bytes: Of their gradients.
        optimizer_bytes: Of the optimizer's state.
        base_bytes: Of the base model's parameters.
    """

    adapter_parameters: int
    base_parameters: int
    modules: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    base_bytes: int

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base model."""
        return self.adapter_parameters / max(self.base_parameters, 1)

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and optimizer state of the adapter, without the base model."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.adapter_parameters:,} parameters on {self.modules} modules, "
            f"{100 * self.share:.2f} % of the base model's {self.base_parameters:,}; "
            f"weights {human_bytes(self.weight_bytes)}, "
            f"gradients {human_bytes(self.gradient_bytes)}, "
            f"optimizer {human_bytes(self.optimizer_bytes)}, "
            f"base model {human_bytes(self.base_bytes)}"
        )


def estimate(
    model: nn.Module,
    config: Any,
    *,
    optimizer_states: int = 2,
    autocast_adapter_dtype: bool = True,
) -> Estimate:
    """Returns the size of an adapter before it is made.

    Args:
        model: Any module, on any device (`torch.device("meta")` allocates nothing), with adapters
            already or without.
        config: A `fastlora.LoraConfig`, or PEFT's own.
        optimizer_states: Tensors that the optimizer keeps for each parameter: 2 for Adam and AdamW,
            1 for SGD with momentum, 0 for plain SGD.
        autocast_adapter_dtype: As in `get_peft_model`: factors of 16-bit base layers are fp32.

    Raises:
        TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
        ValueError: ``optimizer_states`` is negative.
    """
    if optimizer_states < 0:
        raise ValueError(f"optimizer_states is {optimizer_states}, expected at least 0")
    base = getattr(getattr(model, "base_model", None), "model", None)
    if isinstance(base, nn.Module) and hasattr(model, "peft_config"):
        model = base  # a LoraModel: targets are named from its base model
    resolved, plan = resolve_config(model, "estimate", config)
    count = weights = 0
    for numel, itemsize in _trainable(model, resolved, plan, autocast_adapter_dtype):
        count += numel
        weights += numel * itemsize
    own = {id(p): p for p in base_parameters(model)}.values()
    return Estimate(
        adapter_parameters=count,
        base_parameters=sum(logical_numel(p) for p in own),
        modules=len(plan.targets),
        weight_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=optimizer_states * weights,
        base_bytes=sum(p.nbytes for p in own),
    )


def base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that belong to no adapter; one that is tied may come twice."""
    return (parameter for _, parameter in inject._base_parameters("", model))


def logical_numel(parameter: torch.Tensor) -> int:
    """Returns how many values a parameter stands for: bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def human_bytes(count: int) -> str:
    """Returns ``9437184`` as ``"9.0 MiB"``."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} bytes"


def _trainable(
    model: nn.Module, config: LoraConfig, plan: inject.Plan, autocast: bool
) -> Iterator[tuple[int, int]]:
    """Yields count and bytes an element of each tensor that the adapter would train."""
    for name in plan.targets:
        module = model.get_submodule(name)
        features = linear_features(module)
        if features is None:
            continue
        k, n = features
        r = config.rank_for(name)
        size = r * (k + n) + (n if config.lora_bias else 0) + (n if config.use_dora else 0)
        yield size, _factor_itemsize(module, autocast)
    for name in plan.modules_to_save:
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        for parameter in module.parameters():
            yield parameter.numel(), parameter.itemsize
    if config.bias == "none":
        return
    at_targets = {f"{name}.bias" for name in plan.targets}
    at_targets |= {f"{name}.base_layer.bias" for name in plan.targets}
    for name, parameter in inject._base_parameters("", model):
        is_bias = name == "bias" or name.endswith(".bias")
        if is_bias and (config.bias == "all" or name in at_targets):
            yield parameter.numel(), parameter.itemsize


def _factor_itemsize(module: nn.Module, autocast: bool) -> int:
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    # As layers choose it: fp8 and packed integers cannot train.
    own = (p for p in layer.parameters(recurse=False) if p.is_floating_point() and p.itemsize >= 2)
    reference = next(own, None)
    itemsize = (torch.get_default_dtype() if reference is None else reference.dtype).itemsize
    return max(itemsize, torch.float32.itemsize) if autocast else itemsize
