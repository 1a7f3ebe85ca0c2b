"""LoRA layers: state, merging, and a forward through `fastlora.functional`."""

from fastlora.layers.base import LoraLayer
from fastlora.layers.linear import FastLoraLinear
from fastlora.layers.modules_to_save import ModulesToSaveWrapper
from fastlora.layers.wrapped import FastLoraWrapper

__all__ = ["FastLoraLinear", "FastLoraWrapper", "LoraLayer", "ModulesToSaveWrapper"]
