"""Which products a mixed batch in PyTorch is made of: by rows, rank rows, dtype and processor.

Frozen from measurements, like the tables of the kernels: a choice by the clock would give other
rounding from run to run.
"""

from __future__ import annotations

import enum
import functools

import torch

# From so many rows on, what is done for each row outweighs the calls.
_MANY_ROWS = 256
# Samples of so many tokens are worth a product of their own.
_LONG = 16
# Up to so many rank rows, dense products beat moving the rows. SmolLM2's linears, rank 16, over the
# base products, dense and the best of the others: one Zen 4 core, fp32, 64 rows of 2, 3 and 4
# adapters 1.13 and 1.13, 1.19 and 1.15, 1.23 and 1.16; bf16 1.20 and 1.23 of 2, 1.32 and 1.30 of 4,
# 1.53 and 1.42 of 8; 1,024 rows of 2 and 4 in bf16 1.13 and 1.17, 1.22 and 1.14.
_DENSE, _DENSE_FEW_16_BIT = 32, 64
# With AMX 16-bit products are nearly free: 64 rows of 16 adapters 1.78 and 2.71 of the whole model.
_DENSE_AMX = 256
# There, 64 samples of 16 tokens: of 4 adapters 1.24 and 1.35, of 16 1.45 and 1.41.
_DENSE_AMX_LONG = 64


class Rows(enum.Enum):
    """What matters of a batch's rows.

    Attributes:
        FEW: As in a decode.
        MANY: In any order.
        SAMPLES: Many, and each id is that of a sample of adjacent tokens.
    """

    FEW = enum.auto()
    MANY = enum.auto()
    SAMPLES = enum.auto()


def kind_of(rows: int, each: int) -> Rows:
    """Returns the kind of a batch of so many rows, ``each`` of them adjacent for one id."""
    if rows <= _MANY_ROWS:
        return Rows.FEW
    return Rows.SAMPLES if each >= _LONG else Rows.MANY


def is_dense(unit: int, units: int, dtype: torch.dtype, rows: Rows) -> bool:
    """Whether every row had better meet all rank rows: ``units`` of ``unit`` each."""
    if units == 1:
        return True
    limit = _DENSE
    if dtype.itemsize == 2 and _has_amx():
        limit = _DENSE_AMX_LONG if rows is Rows.SAMPLES else _DENSE_AMX
    elif dtype.itemsize == 2 and rows is Rows.FEW:
        limit = _DENSE_FEW_16_BIT
    return unit * units <= limit


@functools.cache
def _has_amx() -> bool:
    """Whether 16-bit products run on this processor's matrix unit."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
