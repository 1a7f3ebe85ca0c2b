"""Quantised base weights: what kernels read of them, as a dense matrix, and written by a merge.

A file for each library, a class for each kind, and nothing else here knows a library of quantised
layers. `quantised` finds the kind of a module, for `fastlora.layers.bases`, for a layer's forward
on kernels (`fastlora.layers.coded_base`) and for merging.
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
