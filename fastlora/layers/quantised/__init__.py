"""Quantized base weights, which kernels can read, and which merging dequantizes and writes.

Each supported library has a file here, and each kind of quantization has a class. No other module
depends on the libraries. `quantised` finds the kind of a module for `fastlora.layers.bases`, for a
layer's forward pass on kernels (`fastlora.layers.coded_base`), and for merging.
"""

from fastlora.layers.quantised import (
    bitsandbytes,  # noqa: F401 - registers kinds
    hqq,  # noqa: F401 - registers a kind
    torchao,  # noqa: F401 - registers a kind
)
from fastlora.layers.quantised.kind import (
    FRESH,
    NotCoded,
    Quantised,
    addresses_of,
    class_name,
    peft_layers,
    quantised,
    register_quantised,
)
from fastlora.layers.quantised.repacking import (
    Repacked,
    keep_layout,
    keeps_layout,
    warn_of_repacked,
)

__all__ = [
    "FRESH",
    "NotCoded",
    "Quantised",
    "Repacked",
    "addresses_of",
    "class_name",
    "keep_layout",
    "keeps_layout",
    "peft_layers",
    "quantised",
    "register_quantised",
    "warn_of_repacked",
]
