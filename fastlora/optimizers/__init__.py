"""Optimizers that update lora_A and lora_B differently. The function names are those of PEFT."""

from fastlora.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from fastlora.optimizers.loraplus import create_loraplus_optimizer, loraplus_groups

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "loraplus_groups",
]
