"""Methods that initialize adapters, with one module per method, and the registry of all methods.

To add a method that depends only on the base weight, add one module to this folder and import it
below. The module of a method that needs data also contains the calibration, which operates on the
modules that its caller passes. The calibration functions that users call are in
`fastlora.model.calibration`.
"""

from fastlora.init import (  # noqa: F401 - the imports register them
    corda,
    eva,
    loftq,
    lora_ga,
    mica,
    olora,
    orthogonal,
    pissa,
    random,
)
from fastlora.init.registry import (
    InitConfigField,
    InitInputs,
    InitMethod,
    InitResult,
    all_init_methods,
    find_init_method,
    register_init,
)

__all__ = [
    "InitInputs",
    "InitMethod",
    "InitConfigField",
    "InitResult",
    "all_init_methods",
    "find_init_method",
    "register_init",
]
