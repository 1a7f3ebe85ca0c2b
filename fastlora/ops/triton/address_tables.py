"""Device tensors of addresses, ranks, and dropout settings, which kernels read as tables.

The host knows the values. A table depends on the parameters alone, so it is cached for the next
call with the same parameters. Copying it to the device does not synchronize. A CUDA graph needs a
warm-up run before its capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.ops.factors import AddressTables, number_tensor_without_sync

_Block = TypeVar("_Block", torch.Tensor, torch.Tensor | None)


def dropout_tables(seeds: torch.Tensor | None, dropout_p: Sequence[float]) -> DropoutTables | None:
    """Return the tables from which kernels read each adapter's dropout seed and probability.

    Each table has one entry for each adapter's slot. The tables contain each probability as a
    threshold and as the scale of the elements that are kept. The result is None if there are no
    seeds. ``seeds`` is int64 ``[S]`` on the device, or None if there is no dropout. ``dropout_p``
    lists the probability of each slot.
    """
    if seeds is None:
        return None
    thresholds = tuple(round(p * 65536) for p in dropout_p)
    inv_keep = tuple(1.0 / (1.0 - p) for p in dropout_p)
    device = seeds.device
    return DropoutTables(
        seeds,
        number_tensor_without_sync(thresholds, torch.int32, device),
        number_tensor_without_sync(inv_keep, torch.float32, device),
    )


def lora_a_rank_row_addresses(
    lora_a: Sequence[torch.Tensor], device: torch.device, table_shape: tuple[int, ...] = (-1,)
) -> RankRows:
    """Return the addresses of the lora_a factors, for kernels that read the rank rows.

    The rank rows are the rows of lora_a. The result is a `RankRows` object, which contains a table
    of the factors' addresses and a table of their ranks. Each table has the given ``table_shape``,
    with one entry for each factor. All factors must be aligned.
    """
    ranks = tuple(a.shape[0] for a in lora_a)
    address, rank = (
        addresses_of(lora_a, device),
        number_tensor_without_sync(ranks, torch.int32, device),
    )
    own = address.view(table_shape), None, rank.view(table_shape), None
    return RankRows(*own, lora_a[0].dtype, max(ranks))


def lora_b_rank_row_addresses(
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scaling: torch.Tensor,
) -> RankRows:
    """Return the addresses of the lora_b factors, for kernels that read the rank rows.

    The rank rows are the columns of lora_b. The result is a `RankRows` object, which contains
    tables of the addresses of lora_b and lora_bias, of the ranks, and of the scalings. Each table
    has one entry for each factor. The tensors must be aligned.
    """
    device, ranks = scaling.device, tuple(b.shape[1] for b in lora_b)
    biased = any(bias is not None for bias in lora_bias)
    bias_address = addresses_of(lora_bias, device) if biased else None
    rank, address = (
        number_tensor_without_sync(ranks, torch.int32, device),
        addresses_of(lora_b, device),
    )
    own = address, bias_address, rank, scaling
    return RankRows(*own, lora_b[0].dtype, max(ranks), by_column=True)


def lora_b_rank_rows_from_tables(tables: AddressTables, module_index: int | slice) -> RankRows:
    """Return a `RankRows` object that holds the lora_b entries of address tables.

    Kernels use the object to read the rank rows, which are the columns of lora_b, by address. The
    object contains the addresses of lora_b and lora_bias, the ranks, and the scalings.
    ``module_index`` selects one module, or a slice of adjacent modules.
    """
    bias = None if tables.bias_address is None else tables.bias_address[module_index]
    own = (
        tables.b_address[module_index],
        bias,
        tables.rank[module_index],
        tables.scaling[module_index],
    )
    return RankRows(*own, tables.dtype, tables.max_rank)


def align_factors(tensors: Sequence[_Block]) -> list[_Block]:
    """Align factors in memory so that kernels can read them by address.

    The function returns all factors as contiguous tensors that are aligned to 16 bytes. Factors
    that do not have this layout are copied. The caller must keep the result until the launch, which
    receives only the addresses.
    """
    return [
        t
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0)
        else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]


def addresses_of(blocks: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """Return a tensor of the memory addresses of the given tensors.

    It has the dtype int64, and contains 0 for None and for empty tensors.
    """
    values = tuple(0 if b is None or not b.numel() else b.data_ptr() for b in blocks)
    return number_tensor_without_sync(values, torch.int64, device)


def max_rank_sum_of_one_adapter(
    lora_a: Sequence[torch.Tensor], slots: int, modules_per_group: int
) -> int:
    """Sum each adapter's ranks over each group of modules, and return the largest sum.

    A group consists of ``modules_per_group`` adjacent modules. Each rank is rounded up to a
    multiple of 4 before it is added, so the result may be larger than the sum of the exact ranks.
    The result is at least 1.
    """
    filled = [-(-a.shape[0] // 4) * 4 for a in lora_a]
    starts = range(0, len(filled), modules_per_group * slots)
    sums = [
        sum(filled[start + slot : start + modules_per_group * slots : slots])
        for start in starts
        for slot in range(slots)
    ]
    return max(1, *sums)
