"""The layer kind of linear-like modules, and the choice of a LoRA layer class for them.

Linear layers that are split across processes are a separate kind
(`fastlora.layers.tensor_parallel`).
"""

from __future__ import annotations

from torch import nn

from fastlora.layers.base_layers import (
    dense_weight,
    fallback_reason_not_plain_linear,
    linear_features,
)
from fastlora.layers.layer_kinds import (
    LINEAR,
    LayerAdapterSettings,
    LayerKind,
    TensorShapes,
    linear_adapter_shapes,
    register_layer_kind,
)
from fastlora.layers.linear import FastLoraLinear
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.sharding import is_dtensor
from fastlora.validation import UnsupportedLayerError


def _wrap(module: nn.Module) -> LoraLayer:
    if fallback_reason_not_plain_linear(module):
        return FastLoraWrapper(module)
    layer = FastLoraLinear._from_linear_without_adapter(module)  # type: ignore[arg-type]  # plain
    layer._freeze_base()
    return layer


def _shapes(module: nn.Module, asked: LayerAdapterSettings) -> TensorShapes:
    # Never None for a module that this kind accepts.
    k, n = linear_features(module) or (0, 0)
    return linear_adapter_shapes(k, n, asked)


def _check(module: nn.Module, asked: LayerAdapterSettings) -> None:
    # Skip sharded weights. FSDP2 layers reject new adapters themselves, and an existing adapter may
    # be reloaded. Tensor-parallel layers check their own shard.
    if asked.use_dora and not is_dtensor(module._parameters.get("weight")):
        dense_weight(module)
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        raise UnsupportedLayerError(
            "it is the output projection of nn.MultiheadAttention, which uses its weight without "
            "calling it; exclude it with exclude_modules, or target the attention module"
        )
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_complex():
        raise UnsupportedLayerError(
            f"its weight has the dtype {weight.dtype}; complex dtypes are not supported"
        )


register_layer_kind(
    LayerKind(LINEAR, lambda m: linear_features(m) is not None, _wrap, _shapes, _check)
)
