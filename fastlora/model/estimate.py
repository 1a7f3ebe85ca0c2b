"""`estimate`: how large an adapter will be, and what training it holds in memory.

From shapes alone: works on a model on the meta device, allocates nothing and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.bases import factor_like
from fastlora.model import inject
from fastlora.model.plan import Plan, plan_for
from fastlora.model.replication import in_place
from fastlora.model.walk import base_of

# bitsandbytes': bytes of a table of 16 values, and how many absmax share one when they are nested.
_CODE_BYTES, _NESTED = 64, 256
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
        base_bytes: Of the base model's parameters, as they are stored: those of bitsandbytes and
            torchao in their bits, with what scales them.
        scale_bytes: How much of that scales quantised weights.
        workspace_bytes: Of the largest quantised weight once it is dequantised, which a step does
            with one weight after the other; 0 where none is.
    """

    adapter_parameters: int
    base_parameters: int
    modules: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    base_bytes: int
    scale_bytes: int = 0
    workspace_bytes: int = 0

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
        bits = (
            f" ({human_bytes(self.scale_bytes)} of it scales), one weight dequantised "
            f"{human_bytes(self.workspace_bytes)}"
        )
        return (
            f"{self.adapter_parameters:,} parameters on {self.modules} modules, "
            f"{100 * self.share:.2f} % of the base model's {self.base_parameters:,}; "
            f"weights {human_bytes(self.weight_bytes)}, "
            f"gradients {human_bytes(self.gradient_bytes)}, "
            f"optimizer {human_bytes(self.optimizer_bytes)}, "
            f"base model {human_bytes(self.base_bytes)}{bits if self.workspace_bytes else ''}"
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
    plan = plan_for(model, "estimate", config)
    with in_place(plan.replication):
        trained = list(_trainable(model, plan, autocast_adapter_dtype))
    weights = sum(numel * itemsize for numel, itemsize in trained)
    own = own_parameters(model)
    stored = [_stored(p) for p in own]
    return Estimate(
        adapter_parameters=sum(numel for numel, _ in trained),
        base_parameters=sum(map(logical_numel, own)),
        modules=len(plan.targets),
        weight_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=optimizer_states * weights,
        base_bytes=sum(of.codes + of.scales for of in stored),
        scale_bytes=sum(of.scales for of in stored),
        workspace_bytes=max((of.dense for of in stored), default=0),
    )


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that belong to no adapter, each once."""
    return list({id(p): p for _, p in inject.base_parameters(model)}.values())


def logical_numel(parameter: torch.Tensor) -> int:
    """Returns how many values a parameter stands for: bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


class _Bytes(NamedTuple):
    """Of a parameter: what it stores, and its matrix where it is quantised."""

    codes: int
    scales: int = 0
    dense: int = 0


def _stored(parameter: torch.Tensor) -> _Bytes:
    """Returns what a parameter takes; of one that bitsandbytes will quantise, what it will take."""
    kind, numel = type(parameter).__name__, logical_numel(parameter)
    own: Any = parameter
    if kind == "Params4bit":
        compute = getattr(own.module, "compute_dtype", None) or torch.float32
        if own.quant_state is not None:
            codes, scales = parameter.nbytes, _tensor_bytes(own.quant_state)
        else:
            codes, blocks = -(-numel // 2), -(-numel // own.blocksize)
            scales = _CODE_BYTES + (
                blocks + 4 * (-(-blocks // _NESTED) + _NESTED + 1)
                if own.compress_statistics
                else 4 * blocks
            )
        return _Bytes(codes, scales, numel * compute.itemsize)
    if kind == "Int8Params":
        # Its backward has the weight in fp16.
        return _Bytes(numel, 4 * parameter.shape[0], 2 * numel)
    if type(parameter).__module__.startswith("torchao."):
        parts, _ = own.__tensor_flatten__()
        sizes = [getattr(own, name).nbytes for name in parts]  # the codes come first
        return _Bytes(sizes[0], sum(sizes[1:]), parameter.nbytes)
    return _Bytes(parameter.nbytes)


def _tensor_bytes(state: object) -> int:
    """Returns what the tensors in a quant state take, and those in the states inside it."""
    found = 0
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif type(value) is type(state):
            found += _tensor_bytes(value)
    return found


def human_bytes(count: int) -> str:
    """Returns ``9437184`` as ``"9.0 MiB"``."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} bytes"


def _trainable(model: nn.Module, plan: Plan, autocast: bool) -> Iterator[tuple[int, int]]:
    """Yields count and bytes an element of each tensor that the adapter would train."""
    config = plan.config
    for target in plan.targets.values():
        itemsize = _factor_itemsize(target.base, autocast)
        for shape in target.shapes().values():
            yield math.prod(shape), itemsize
    for name in plan.modules_to_save:
        for parameter in base_of(model.get_submodule(name)).parameters():
            yield parameter.numel(), parameter.itemsize
    for name, tokens in plan.tokens.items():
        weight: Any = base_of(model.get_submodule(name)).weight
        itemsize = max(weight.itemsize, torch.float32.itemsize) if autocast else weight.itemsize
        if tokens.tied_to is None:
            yield len(tokens.indices) * weight.shape[1], itemsize
    targets = (model.get_submodule(name) for name in plan.targets)
    copied = (model.get_submodule(name) for name in plan.modules_to_save)
    for parameter in inject.trained_biases(model, config.bias, targets, copied).values():
        yield parameter.numel(), parameter.itemsize


def _factor_itemsize(base: nn.Module, autocast: bool) -> int:
    reference = factor_like(base)
    itemsize = (torch.get_default_dtype() if reference is None else reference.dtype).itemsize
    return max(itemsize, torch.float32.itemsize) if autocast else itemsize
