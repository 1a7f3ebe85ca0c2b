"""`estimate`: estimate the size of an adapter, and the memory that is needed to train it.

The estimate uses only the shapes of tensors. It works with a model on the meta device, allocates no
tensors, and does not change the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.base_layers import factor_reference
from fastlora.model import inject
from fastlora.model.base_modules import base_module_of
from fastlora.model.plan import AdapterPlan, make_adapter_plan
from fastlora.model.replication import temporary_replication

# In bitsandbytes: the size of a table of 16 values in bytes, and the block size of nested scales,
# which is the number of absmax values that share one scale.
_CODE_BYTES, _NESTED = 64, 256
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Estimate:
    """An estimate of an adapter's size and of the memory needed to train a model with it.

    `estimate` returns this object without creating the adapter. The memory for activations is not
    included.

    Attributes:
        adapter_parameters: The number of trainable parameters. These are the adapter's trainable
            parameters and the biases of the base model that its config trains.
        base_parameters: The number of parameters of the model without fastlora's adapters. Tied
            weights are counted once.
        modules: The number of modules that the adapter adapts.
        weight_bytes: The size of the trainable parameters in bytes.
        gradient_bytes: The size of their gradients in bytes.
        optimizer_bytes: The size of the optimizer state in bytes.
        base_bytes: The size of the base model's parameters in bytes, as they are stored. Weights
            quantized by bitsandbytes or torchao are counted in their quantized form, including
            their scales.
        scale_bytes: The part of ``base_bytes`` that is taken by the scales of quantized weights.
        workspace_bytes: The size of the largest quantized weight after dequantization in bytes, or
            0 if no weight is quantized. A training step dequantizes one weight at a time.
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
        """The share of trainable parameters, as a fraction of the base model's parameters.

        The value is the number of trainable parameters divided by the number of parameters of the
        base model.
        """
        return self.adapter_parameters / max(self.base_parameters, 1)

    @property
    def training_bytes(self) -> int:
        """The estimated number of bytes that training needs for the adapter alone.

        The number is the total size of the trainable parameters, their gradients, and the optimizer
        state. The memory for the base model, activations, and dequantized weights (see
        `workspace_bytes`) is not included.
        """
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def __str__(self) -> str:
        """Return a one-line summary of the estimate."""
        bits = (
            f" (including {format_bytes(self.scale_bytes)} of scales), one dequantized weight "
            f"{format_bytes(self.workspace_bytes)}"
        )
        return (
            f"{self.adapter_parameters:,} parameters on {self.modules} modules, "
            f"{100 * self.share:.2f} % of the base model's {self.base_parameters:,}; "
            f"weights {format_bytes(self.weight_bytes)}, "
            f"gradients {format_bytes(self.gradient_bytes)}, "
            f"optimizer {format_bytes(self.optimizer_bytes)}, "
            f"base model {format_bytes(self.base_bytes)}{bits if self.workspace_bytes else ''}"
        )


def estimate(
    model: nn.Module,
    config: Any,
    *,
    optimizer_states: int = 2,
    autocast_adapter_dtype: bool = True,
) -> Estimate:
    """Estimate the memory needed to train a model with a LoRA config, and count the parameters.

    The memory for activations is not included. The adapter is not created, and the model is not
    changed.

    Args:
        model: Any module on any device, with or without adapters of fastlora. A model on
            ``torch.device("meta")`` needs no memory.
        config: A `fastlora.LoraConfig` or a ``peft.LoraConfig``.
        optimizer_states: The number of tensors that the optimizer stores for each parameter: 2 for
            Adam and AdamW, 1 for SGD with momentum, and 0 for plain SGD.
        autocast_adapter_dtype: Whether the factors of 16-bit base layers are stored in fp32, as in
            `get_peft_model`.

    Raises:
        TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
        AdapterStateError: If the initialization changes a weight that another module shares.
        ValueError: If ``optimizer_states`` is negative.
    """
    if optimizer_states < 0:
        raise ValueError(f"optimizer_states must be at least 0, got {optimizer_states}")
    base = getattr(getattr(model, "base_model", None), "model", None)
    if isinstance(base, nn.Module) and hasattr(model, "peft_config"):
        model = base  # a LoraModel; the names of targets are relative to its base model
    plan = make_adapter_plan(model, "estimate", config)
    with temporary_replication(plan.replication):
        trained = list(_trained_tensor_numels_and_itemsizes(model, plan, autocast_adapter_dtype))
    weights = sum(numel * itemsize for numel, itemsize in trained)
    own = unique_base_parameters(model)
    stored = [_parameter_bytes(p) for p in own]
    return Estimate(
        adapter_parameters=sum(numel for numel, _ in trained),
        base_parameters=sum(map(unpacked_numel, own)),
        modules=len(plan.targets),
        weight_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=optimizer_states * weights,
        base_bytes=sum(of.values + of.scales for of in stored),
        scale_bytes=sum(of.scales for of in stored),
        workspace_bytes=max((of.dense for of in stored), default=0),
    )


def unique_base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the base model's parameters, without duplicates.

    These are the parameters that do not belong to any adapter.
    """
    return list({id(p): p for _, p in inject.base_parameters(model)}.values())


def unpacked_numel(parameter: torch.Tensor) -> int:
    """Return the number of elements in a parameter, counting packed values individually.

    The result differs from ``parameter.numel()`` for 4-bit weights of bitsandbytes, in which two
    values are packed into a byte.
    """
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


class _StoredAndDenseBytes(NamedTuple):
    """The sizes of a parameter in bytes, as stored and as a dense tensor.

    The sizes are used for a memory estimate. The size as a dense tensor is recorded only for
    quantized parameters.

    Attributes:
        values: The size of the stored values, quantized or not.
        scales: The size of the scales of a quantized weight, or 0 if it is not quantized.
        dense: The size of a quantized weight after dequantization, or 0 if it is not quantized.
    """

    values: int
    scales: int = 0
    dense: int = 0


def _parameter_bytes(parameter: torch.Tensor) -> _StoredAndDenseBytes:
    """Return the sizes of a parameter in bytes, as stored and as a dense tensor.

    For a weight that bitsandbytes has not quantized yet, the sizes after quantization are returned.
    """
    kind, numel = type(parameter).__name__, unpacked_numel(parameter)
    own: Any = parameter
    if kind == "Params4bit":
        compute = getattr(own.module, "compute_dtype", None) or torch.float32
        if own.quant_state is not None:
            values, scales = parameter.nbytes, _quant_state_bytes(own.quant_state)
        else:
            values, blocks = -(-numel // 2), -(-numel // own.blocksize)
            scales = _CODE_BYTES + (
                blocks + 4 * (-(-blocks // _NESTED) + _NESTED + 1)
                if own.compress_statistics
                else 4 * blocks
            )
        return _StoredAndDenseBytes(values, scales, numel * compute.itemsize)
    if kind == "Int8Params":
        # The backward pass dequantizes the weight to fp16.
        return _StoredAndDenseBytes(numel, 4 * parameter.shape[0], 2 * numel)
    if type(parameter).__module__.startswith("torchao."):
        parts, _ = own.__tensor_flatten__()
        sizes = [getattr(own, name).nbytes for name in parts]  # the quantized values come first
        return _StoredAndDenseBytes(sizes[0], sum(sizes[1:]), parameter.nbytes)
    return _StoredAndDenseBytes(parameter.nbytes)


def _quant_state_bytes(state: object) -> int:
    """Return the size of a quantization state in bytes.

    This is the total size of the tensors in a bitsandbytes ``QuantState``. The tensors of nested
    states are included.
    """
    found = 0
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif type(value) is type(state):
            found += _quant_state_bytes(value)
    return found


def format_bytes(count: int) -> str:
    """Format a number of bytes for display.

    For example, 9437184 becomes ``"9.0 MiB"``.
    """
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} bytes"


def _trained_tensor_numels_and_itemsizes(
    model: nn.Module, plan: AdapterPlan, autocast: bool
) -> Iterator[tuple[int, int]]:
    """Yield a tuple ``(numel, itemsize)`` for each tensor that training the adapter would update.

    ``itemsize`` is in bytes. The tensors include base-model biases that the config selects.
    """
    config = plan.config
    frozen = tuple(factor.removeprefix("lora") for factor in config.init.frozen)  # such as "_B"
    for target in plan.targets.values():
        itemsize = _factor_itemsize(target.base, autocast)
        for key, shape in target.tensor_shapes_by_key_within_module().items():
            parts = (part for part in key.split(".") if part.startswith("lora_"))
            if not any(part.endswith(frozen) for part in parts):
                yield math.prod(shape), itemsize
    for name in plan.modules_to_save:
        for parameter in base_module_of(model.get_submodule(name)).parameters():
            yield parameter.numel(), parameter.itemsize
    for name, tokens in plan.tokens.items():
        weight: Any = base_module_of(model.get_submodule(name)).weight
        itemsize = max(weight.itemsize, torch.float32.itemsize) if autocast else weight.itemsize
        if tokens.tied_to is None:
            yield len(tokens.indices) * weight.shape[1], itemsize
    targets = (model.get_submodule(name) for name in plan.targets)
    copied = (model.get_submodule(name) for name in plan.modules_to_save)
    for parameter in inject.base_biases_to_train(model, config.bias, targets, copied).values():
        yield parameter.numel(), parameter.itemsize


def _factor_itemsize(base: nn.Module, autocast: bool) -> int:
    reference = factor_reference(base)
    itemsize = (torch.get_default_dtype() if reference is None else reference.dtype).itemsize
    return max(itemsize, torch.float32.itemsize) if autocast else itemsize
