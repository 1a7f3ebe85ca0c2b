"""Rules that choose how PyTorch arranges the matrix products of a mixed batch.

The choice depends on rows, rank rows, dtype, and processor. The rules come from measurements, like
the tables of the kernels. If the choice were timed at run time, results would be rounded
differently from run to run.
"""

from __future__ import annotations

import enum

import torch

# Up to this many rows, the overhead of calls exceeds the work on the rows.
_FEW_ROWS = 256
# A sample with at least this many tokens is worth a product of its own.
_LONG = 16
# Up to this many rank rows, dense products are faster than moving the rows. Time of SmolLM2's
# linears with rank 16, relative to the base products, for dense products and for the best
# alternative (one Zen 4 core). fp32, 64 rows: 1.13 and 1.13 with 2 adapters, 1.19 and 1.15 with 3,
# 1.23 and 1.16 with 4. bf16, 64 rows: 1.20 and 1.23 with 2 adapters, 1.32 and 1.30 with 4, 1.53 and
# 1.42 with 8. bf16, 1,024 rows: 1.13 and 1.17 with 2 adapters, 1.22 and 1.14 with 4.
_DENSE = 32
# With a matrix unit, products are nearly free. Time relative to the whole model without adapters,
# for dense products and for the best alternative (bf16, one Xeon core with AMX): 1.78 and 2.71 for
# 64 rows of 16 adapters. For 64 samples of 16 tokens: 1.24 and 1.35 with 4 adapters, 1.45 and 1.41
# with 16.
_DENSE_MATRIX_UNIT = 256
# With at least this many rank rows, a product is faster if a column of them is adjacent in memory.
_WIDE = 16
# Up to this many rows per adapter, `embedding_bag` sums rank rows of lora_b faster than matrix
# products do. Time of the expand of 16 rows in fp32 with N = 1536, in us, for `embedding_bag` and
# for the best products (one Zen 5 core). Rank 8: 14 and 8 with 1 adapter, 16 and 22 with 4, 26 and
# 38 with 16. Rank 64: 63 and 52, 120 and 128, 170 and 249. 64 rows of 4 adapters of rank 64: 325
# and 230. PyTorch's `embedding_bag` is vectorized for AVX2 and AVX-512.
_SUMMED_ROWS_EACH = 8
# The same limit for the product of an adapter's rows and its rank.
_TERMS_EACH = 256
_HAS_FAST_SUMS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_CAPABILITIES = torch.cpu.get_capabilities()
# The dtypes for which this processor has a matrix unit.
_MATRIX_UNIT = frozenset(
    dtype
    for dtype, name in ((torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16"))
    if _CAPABILITIES.get(name, False)
)


class BatchSizeCategory(enum.Enum):
    """A category of batches by size: few rows, many rows, or many rows in long samples.

    The category affects how the matrix products of a batch are computed.

    Attributes:
        FEW: Few rows, as in a decode step or with a short prompt.
        MANY: Many rows in any order.
        SAMPLES: Many rows, in long samples. Each id covers the adjacent tokens of one sample.
    """

    FEW = enum.auto()
    MANY = enum.auto()
    SAMPLES = enum.auto()


def batch_size_category(num_rows: int, rows_per_id: int) -> BatchSizeCategory:
    """Return the size category of a batch: few rows, many rows, or many rows in long samples.

    ``rows_per_id`` is the number of adjacent rows that each id covers. Many rows count as long
    samples if this number is large enough.
    """
    if num_rows <= _FEW_ROWS:
        return BatchSizeCategory.FEW
    return BatchSizeCategory.SAMPLES if rows_per_id >= _LONG else BatchSizeCategory.MANY


def dense_products_are_fastest(
    unit: int, units: int, dtype: torch.dtype, *, every_unit_is_used: bool
) -> bool:
    """Return whether dense products are expected to be the fastest kind of matrix product.

    Dense products multiply every row by the packed rank rows of all adapters. All other kinds of
    products multiply each row by the packed rank rows of only some adapters. There are ``units``
    units of ``unit`` rank rows each.

    If a batch does not use every unit, dense products waste time, except on a matrix unit: for 16
    rows of one adapter in 4 slots of rank 8, the linears of SmolLM2 take 8.5 ms longer than without
    adapters, and 5.3 ms longer with products of the used unit alone (one Zen 5 core).
    """
    if dtype in _MATRIX_UNIT:
        return units == 1 or unit * units <= _DENSE_MATRIX_UNIT
    return units == 1 or (every_unit_is_used and unit * units <= _DENSE)


def expand_by_embedding_bag_is_faster(
    rows: int, adapters: int, rank: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether `embedding_bag` is faster than matrix products in the expand step.

    `embedding_bag` computes a weighted sum for each row. The sum for a row is over the columns of
    its adapter's lora_b, and the weights are the row's elements of s. Each of the ``rows`` rows
    belongs to one of ``adapters`` adapters, whose largest rank is ``rank``, or to none.
    """
    has_fast_sums = dtype == torch.float32 and device.type == "cpu" and _HAS_FAST_SUMS
    each = min(_SUMMED_ROWS_EACH, _TERMS_EACH // rank)
    return has_fast_sums and adapters > 1 and rows <= min(each * adapters, _FEW_ROWS)


def column_major_lora_a_is_faster(rank_rows: int, dtype: torch.dtype) -> bool:
    """Return whether matrix products are faster when lora_a is stored in column-major order.

    The column-major layout of lora_a is ``[K, rank_rows]`` instead of ``[rank_rows, K]``.

    For 16 rows and K = 1536 in fp32, a product with 64 rank rows takes 20 us instead of 57 us (one
    Zen 4 core). For 4 units of 8 rank rows with 4 rows each, the product takes 11 us instead of
    6 us. In 16-bit dtypes, the rank rows of several units can form one block only if they are
    adjacent.
    """
    return dtype.itemsize >= 4 and rank_rows >= _WIDE


def coalescing_units_is_faster(dtype: torch.dtype, kind: BatchSizeCategory) -> bool:
    """Return whether matrix products are faster if units are coalesced into larger blocks.

    A unit is a group of adjacent rank rows, which are rows of lora_a or columns of lora_b. The
    number of rank rows in a unit is the largest rank. If units are coalesced, each block of a
    product has several units. Otherwise, each block has one unit. Blocks of several units are
    faster for few rows in a 16-bit dtype.

    In bf16, 64 rows of 64 adapters take 4.6 times as long as the base product if blocks have 4
    rows, and 6.1 times as long if blocks have 1 row. In fp32, the block size makes no difference.
    """
    return dtype.itemsize == 2 and kind is BatchSizeCategory.FEW
