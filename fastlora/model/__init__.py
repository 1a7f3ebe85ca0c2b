"""Adapters of a whole model: configs, target modules, adapter files, and the model class."""

from fastlora.model.lora_model import LoraModel, get_peft_model

__all__ = ["LoraModel", "get_peft_model"]
