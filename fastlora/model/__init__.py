"""Adapters in a whole model: configs, targets, files."""

from fastlora.model.lora_model import LoraModel, get_peft_model

__all__ = ["LoraModel", "get_peft_model"]
