"""Which products a mixed batch in PyTorch is made of: by rows, rank rows, dtype and processor.

Frozen from measurements, like the tables of the kernels: a choice by the clock would give other
rounding from run to run.
"""

from __future__ import annotations

import enum

import torch

# Up to so many rows, calls outweigh what is done for each row.
_FEW_ROWS = 256
# Samples of so many tokens are worth a product of their own.
_LONG = 16
# Up to so many rank rows, dense products beat moving the rows. SmolLM2's linears, rank 16, over the
# base products, dense and the best of the others: one Zen 4 core, fp32, 64 rows of 2, 3 and 4
# adapters 1.13 and 1.13, 1.19 and 1.15, 1.23 and 1.16; bf16 1.20 and 1.23 of 2, 1.32 and 1.30 of 4,
# 1.53 and 1.42 of 8; 1,024 rows of 2 and 4 in bf16 1.13 and 1.17, 1.22 and 1.14.
_DENSE = 32
# On a matrix unit products are nearly free: 64 rows of 16 adapters 1.78 and 2.71 of the whole model
# (bf16, one Xeon core with AMX); 64 samples of 16 tokens of 4 adapters 1.24 and 1.35, of 16 1.45
# and 1.41.
_DENSE_MATRIX_UNIT = 256
_CAPABILITIES = torch.cpu.get_capabilities()
# The dtypes that this processor has a matrix unit for.
_MATRIX_UNIT = frozenset(
    dtype
    for dtype, name in ((torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16"))
    if _CAPABILITIES.get(name, False)
)


class RowsKind(enum.Enum):
    """What matters of a batch's rows.

    Attributes:
        FEW: As in a decode or with a short prompt.
        MANY: More, in any order.
        SAMPLES: Many, and each id is that of a long sample, whose tokens are adjacent.
    """

    FEW = enum.auto()
    MANY = enum.auto()
    SAMPLES = enum.auto()


def kind_of(rows: int, each: int) -> RowsKind:
    """Returns the kind of a batch of so many rows, ``each`` of them adjacent for one id."""
    if rows <= _FEW_ROWS:
        return RowsKind.FEW
    return RowsKind.SAMPLES if each >= _LONG else RowsKind.MANY


def is_dense(unit: int, units: int, dtype: torch.dtype) -> bool:
    """Whether every row had better meet all rank rows: ``units`` of ``unit`` each."""
    limit = _DENSE_MATRIX_UNIT if dtype in _MATRIX_UNIT else _DENSE
    return units == 1 or unit * units <= limit


def is_coalesced(dtype: torch.dtype, kind: RowsKind) -> bool:
    """Whether batched products want several units to a block: in 16 bits, for few rows.

    64 rows of 64 adapters in bf16 take 4.6 times the base product in blocks of 4 rows and 6.1 in
    blocks of 1; in fp32 it is all the same.
    """
    return dtype.itemsize == 2 and kind is RowsKind.FEW
