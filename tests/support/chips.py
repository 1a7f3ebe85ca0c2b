"""The chips that the configs are for, with the processors of one card each."""

from __future__ import annotations

from fastlora.kernels.chips import Chip

GPUS = (
    Chip("sm_80", 108),
    Chip("sm_86", 84),
    Chip("sm_89", 142),
    Chip("sm_90", 132),
    Chip("sm_100", 148),
    Chip("sm_120", 188),
    Chip("gfx942", 304),
    Chip("gfx950", 256),
)
CHIPS = (Chip("interpreter", 4), *GPUS)
H100 = Chip("sm_90", 132)
