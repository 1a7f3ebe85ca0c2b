"""Initializations of adapters: one file per method, and the registry of all methods.

A method that depends only on the base weight is one new file here, imported below. A method that
needs data also has its calibration in that file. The calibration works on modules that the caller
names; the functions that users call are in `fastlora.model.calibration`.
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
from fastlora.init.registry import Given, Init, Settings, Start, all_inits, find_init, register_init

__all__ = ["Given", "Init", "Settings", "Start", "all_inits", "find_init", "register_init"]
