"""Kernel launches that add the updates of adapters to y in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.kernels import lora_expand, mixed_lora_expand
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.configs import sums_s_once
from fastlora.kernels.launch import cached_launches, empty
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.kernels.modules import Module
from fastlora.ops.factors import Factor, address_tables_from_tensors, replace_missing_with_empty
from fastlora.ops.triton.address_tables import (
    align_factors,
    lora_b_rank_row_addresses,
    lora_b_rank_rows_from_tables,
)
from fastlora.ops.triton.launch_configs import chip_of, config_of
from fastlora.ops.triton.shrink import (
    mixed_shrink_partials,
    reduce_split_k,
    to_kernel_layout,
)

_Tensors = Sequence[torch.Tensor]


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    lora_b: Sequence[Factor],
    lora_bias: Sequence[Factor],
    scaling: torch.Tensor,
) -> None:
    """Add the LoRA update of each row's adapter to y in place, including the LoRA bias.

    The update of a row is ``scaling * (s @ lora_b.T + lora_bias)``, where s is the shrink output.
    y is ``[M, N]``. If ``rows`` is empty, one slot has all rows, and its lora_bias must be None.
    """
    ups = replace_missing_with_empty(lora_b, 1)
    if not rows:
        expand_one_adapter_(y, s, ups[0], scaling)
        return
    ups, biases = align_factors(ups), align_factors(lora_bias)
    up = lora_b_rank_row_addresses(ups, biases, scaling)
    (m, n), r = y.shape, up.largest
    config = config_of("mixed_lora_train_expand", y, m, n, r=r)
    expand_mixed_([y], s.unsqueeze(0), rows, up, config=config)


@cached_launches
def expand_one_adapter_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    """Add the update of one adapter to y in place.

    One launch computes it, with products in y's dtype.
    """
    (m, n), r = y.shape, s.shape[1]
    config = config_of("lora_expand", y, m, n, r=r)
    lora_expand.launch_lora_expand([Module(y, lora_b, scaling)], s, reads_y=True, config=config)


@cached_launches
def add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> None:
    """Add each row's LoRA update to y in place, using the factors' addresses in ``tables``.

    Each row of y gets the update of its own adapter, which is computed from the same row of the
    layer's input x. The function launches a shrink and then an expand. ``index`` is the layer's row
    in the tables.
    """
    found = address_tables_from_tensors(tables, max_rank, factor_dtype)
    x = to_kernel_layout(x)
    s = mixed_shrink_partials(x, rows, found, slice(index, index + 1))
    (m, k), n = x.shape, y.shape[1]
    config = config_of("mixed_lora_expand", y, m, n, k, max_rank)
    up = lora_b_rank_rows_from_tables(found, index)
    expand_mixed_([y], s[:, 0], rows, up, config=config, pdl=True)


def expand_mixed_(
    module_outputs: Sequence[torch.Tensor],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    dropout: DropoutTables | None = None,
) -> None:
    """Add each row's LoRA update to the modules' outputs in place.

    One launch computes the updates for all modules. Before this launch, another launch may add the
    partial sums of s (`configs.sums_s_once`).

    s is ``[splits, M, R]``, or for several modules ``[splits, G, M, R]`` with tables ``[G, S]``.
    ``pdl`` means that the previous launch is the shrink that computes s.
    """
    (splits, *_, m, r), y = s.shape, module_outputs[0]
    tiles = sum(cdiv(own.shape[1], config.block_n) for own in module_outputs)
    y_bytes = y.itemsize * m * sum(own.shape[1] for own in module_outputs)
    if sums_s_once(chip_of(y), m, r, splits, tiles, y_bytes):
        partials, s = s, empty(y, 1, *s.shape[1:])
        reduce_split_k(s[0], partials, after_shrink=pdl)
        pdl = False
    mixed_lora_expand.launch_mixed_lora_expand(
        *(module_outputs, s, rows, up),
        config=config,
        pdl=pdl and chip_of(s).has_pdl,
        dropout=dropout,
    )
