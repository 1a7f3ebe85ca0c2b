"""The layer kind of linear-like modules, and the choice of a LoRA layer class for them.

Linears that are split over processes are a separate kind (`fastlora.layers.tensor_parallel`).
"""

from __future__ import annotations

from torch import nn

from fastlora.layers.base import LoraLayer
from fastlora.layers.bases import dense_weight, linear_features, why_not_plain
from fastlora.layers.kinds import LINEAR, Kind, Settings, Shapes, linear_shapes, register_kind
from fastlora.layers.linear import FastLoraLinear
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.sharding import is_sharded
from fastlora.validation import UnsupportedLayerError


def _wrap(module: nn.Module) -> LoraLayer:
    if why_not_plain(module):
        return FastLoraWrapper(module)
    layer = FastLoraLinear._around(module)  # type: ignore[arg-type]  # plain
    layer._freeze_base()
    return layer


def _shapes(module: nn.Module, asked: Settings) -> Shapes:
    # Never None for a module that this kind accepts.
    k, n = linear_features(module) or (0, 0)
    return linear_shapes(k, n, asked)


def _check(module: nn.Module, asked: Settings) -> None:
    # Skip sharded weights. FSDP2 layers reject new adapters themselves, and an existing adapter may
    # be reloaded. Tensor-parallel layers check their own shard.
    if asked.use_dora and not is_sharded(module._parameters.get("weight")):
        dense_weight(module)
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        raise UnsupportedLayerError(
            "it is the output projection of nn.MultiheadAttention, which uses its weight without "
            "calling it"
        )


register_kind(Kind(LINEAR, lambda m: linear_features(m) is not None, _wrap, _shapes, _check))
