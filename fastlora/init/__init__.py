"""Initialisations of adapters: one file a method, and the registry that knows them all.

A method that is only a function of the base weight is one new file here, imported below. One that
needs data has its calibration in the same file, over modules that the caller names; what users call
is in `fastlora.model.calibration`.
"""

from fastlora.init import (  # noqa: F401 - they register
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
