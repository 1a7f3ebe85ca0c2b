"""Add adapters to a whole model, and save and load them: configs, target modules, and files."""

from fastlora.model.lora_model import LoraModel, get_peft_model

__all__ = ["LoraModel", "get_peft_model"]
