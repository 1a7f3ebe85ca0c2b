"""The functions of `fastlora.model.hotswap`, under PEFT's module name ``utils.hotswap``."""

from fastlora.model.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

__all__ = [
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
