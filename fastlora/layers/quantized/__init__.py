"""Quantized base weights, which kernels can read, and which merging dequantizes and writes.

Each supported library has a file here, and each kind of quantization has a class. No other module
depends on the libraries. `quantized_weight_of` finds the kind of a module for
`fastlora.layers.base_layers`, for a layer's forward pass on kernels
(`fastlora.layers.quantized_base`), and for merging.
"""

from fastlora.layers.quantized import (
    bitsandbytes,  # noqa: F401 - registers kinds
    hqq,  # noqa: F401 - registers a kind
    torchao,  # noqa: F401 - registers a kind
)
from fastlora.layers.quantized.base_weight import (
    UNREFERENCED_OUTPUT_MODULES,
    BaseQuantizedWeight,
    KernelsCannotReadError,
    address_tensor,
    peft_quantized_layer_classes,
    qualified_class_name,
    quantized_weight_of,
    register_quantized_weight,
)
from fastlora.layers.quantized.repacking import (
    ProductWithRepackedCopy,
    is_bitsandbytes_repacking_prevented,
    prevent_bitsandbytes_repacking,
    warn_if_gradients_blocked,
)

__all__ = [
    "UNREFERENCED_OUTPUT_MODULES",
    "KernelsCannotReadError",
    "BaseQuantizedWeight",
    "ProductWithRepackedCopy",
    "address_tensor",
    "qualified_class_name",
    "prevent_bitsandbytes_repacking",
    "is_bitsandbytes_repacking_prevented",
    "peft_quantized_layer_classes",
    "quantized_weight_of",
    "register_quantized_weight",
    "warn_if_gradients_blocked",
]
