"""Dequantize linear layers: replace them with plain `torch.nn.Linear` layers, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastlora.layers.base_layers import dense_weight, linear_features
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.quantized import quantized_weight_of
from fastlora.validation import UnsupportedLayerError

# Attributes that transformers sets on a quantized model, in addition to `quantization_config` in
# the model's config.
_QUANTIZATION_ATTRIBUTES = (
    "hf_quantizer",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)


def dtype_for_dequantized_weights(
    model: nn.Module, base_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.dtype:
    """Return the dtype that the weights of quantized linear layers should have after
    dequantization.

    It is the dtype of the first floating-point base parameter that has at least 16 bits per value
    and is not a quantized weight, because activations have this dtype. If there is no such
    parameter, the result is the compute dtype of the first quantized linear layer, or fp32 if it
    has none.

    Args:
        model: The base model with its adapters.
        base_parameters: The base model's parameters, with their names.
    """
    linears = [module for module in model.modules() if is_quantized_linear(module)]
    quantized_weights = {id(module._parameters.get("weight")) for module in linears}
    for _, parameter in base_parameters:
        wide = parameter.is_floating_point() and parameter.itemsize >= 2
        if wide and id(parameter) not in quantized_weights:
            return parameter.dtype
    own: Any = linears[0] if linears else None
    weight: Any = getattr(own, "weight", None)
    compute = getattr(own, "compute_dtype", None) or getattr(weight, "dtype", None)
    return compute if compute is not None and compute.is_floating_point else torch.float32


def is_quantized_linear(module: object) -> bool:
    """Return whether a module is a quantized linear layer.

    Such a layer has a quantized weight. The result is False for a module that wraps such a layer.
    """
    if not isinstance(module, nn.Module) or linear_features(module) is None:
        return False
    # HQQ calls its weight W_q. A module that wraps a quantized layer has neither parameter.
    own = module._parameters.keys() & {"weight", "W_q"}
    return bool(own) and quantized_weight_of(module) is not None


@contextlib.contextmanager
def temporarily_dequantized(layer: nn.Module, with_values: bool) -> Iterator[bool]:
    """Dequantize a layer for the duration of a ``with`` block.

    The quantized base layer of a LoRA layer is replaced with a plain linear layer. The base layer
    is restored when the ``with`` block ends. This allows a merge to be checked before the base
    layer is dequantized permanently. A LoRA layer without a quantized base layer is not changed.

    Args:
        layer: The LoRA layer.
        with_values: Whether to create the plain layer with the dequantized values, in fp32. If
            False, the plain layer is created on the meta device.

    Yields:
        Whether the base layer is replaced.

    Raises:
        UnsupportedLayerError: If the quantization format is not supported.
    """
    own: Any = getattr(layer, "base_layer", None)
    if not (isinstance(layer, LoraLayer) and is_quantized_linear(own)):
        yield False
        return
    layer.base_layer = _dequantized_linear(own, torch.float32 if with_values else None)
    try:
        yield True
    finally:
        layer.base_layer = own


def dequantize_base_layer(layer: nn.Module) -> bool:
    """Dequantize the base layer of a LoRA layer.

    The quantized base layer is replaced in place with a plain linear layer in fp32. If adapters are
    merged and the quantized weight from before the merge is available, the adapters are unmerged
    first and merged again into the plain layer. Otherwise, the merged weight is dequantized.

    Returns:
        True if the base layer was replaced. False if it is not a quantized linear layer, or if
        ``layer`` is not a LoRA layer.
    """
    own: Any = getattr(layer, "base_layer", None)
    if not (isinstance(layer, LoraLayer) and is_quantized_linear(own)):
        return False
    merged = list(layer.merged_adapters) if layer._unmerged is not None else []
    if merged:
        layer.unmerge()
    layer.base_layer = _dequantized_linear(own, torch.float32)
    layer.merge_error = None
    if merged:
        layer.merge(adapter_names=merged, keep_base=False)
    return True


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace every quantized linear layer of a model with a plain linear layer.

    The attributes that mark the model as quantized are removed, and so are the conversions with
    which transformers read the quantized weights. It cannot save a model that has them.

    Args:
        model: The model.
        dtype: The dtype of the new weights.

    Returns:
        The model, or the new linear layer if the model itself is a quantized linear layer.
    """
    made: dict[nn.Module, nn.Linear] = {}  # a layer with several names is replaced under each
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_quantized_linear(module):
            if module not in made:
                made[module] = _dequantized_linear(module, dtype)
            if not name:
                return made[module]
            model.set_submodule(name, made[module])
    own: Any = model
    for name in _QUANTIZATION_ATTRIBUTES:
        if name in own.__dict__:
            delattr(own, name)
    if hasattr(getattr(own, "config", None), "quantization_config"):
        del own.config.quantization_config
    if hasattr(own, "is_quantized"):
        own.is_quantized = False
    if getattr(own, "_weight_conversions", None):
        own._weight_conversions = [
            each for each in own._weight_conversions if not _reads_quantized_weights(each)
        ]
    return model


def _reads_quantized_weights(conversion: Any) -> bool:
    """Return whether a weight conversion of transformers contains an operation of a quantizer."""
    return any(hasattr(each, "hf_quantizer") for each in getattr(conversion, "operations", ()))


@torch.no_grad()
def _dequantized_linear(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    """Return a plain `nn.Linear` with the dequantized weight of a module.

    It also has the module's bias. The weight and the bias are converted to ``dtype``. If ``dtype``
    is None, the layer is created on the meta device, without values.
    """
    k, n = linear_features(module) or (0, 0)
    bias: Any = getattr(module, "bias", None)
    made = nn.Linear(k, n, bias is not None, device="meta").requires_grad_(False)
    if dtype is not None:
        made.weight = nn.Parameter(
            _dequantized_weight(module).detach().to(dtype), requires_grad=False
        )
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    return made.train(module.training)


def _dequantized_weight(module: nn.Module) -> torch.Tensor:
    found = quantized_weight_of(module)
    if found is not None:
        try:
            return found.merge_buffer()
        except UnsupportedLayerError:
            pass  # this format can be read but not written
    return dense_weight(module).float()
