"""LoRA layers: their adapters, merging, and their forward pass."""

from fastlora.layers import (  # noqa: F401 - importing them registers their layer kinds
    conv,
    embedding,
    experts,
    linear_kind,
    tensor_parallel,
)
from fastlora.layers.attention import FastLoraMultiheadAttention
from fastlora.layers.conv import FastLoraConv
from fastlora.layers.embedding import FastLoraEmbedding
from fastlora.layers.linear import FastLoraLinear
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.module_wrapper import ModuleWrapper
from fastlora.layers.modules_to_save import ModulesToSaveWrapper
from fastlora.layers.trainable_tokens import TrainableTokensWrapper
from fastlora.layers.wrapped import FastLoraWrapper

__all__ = [
    "FastLoraConv",
    "FastLoraEmbedding",
    "FastLoraLinear",
    "FastLoraMultiheadAttention",
    "FastLoraWrapper",
    "LoraLayer",
    "ModuleWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
]
