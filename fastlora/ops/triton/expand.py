"""Kernel launches that add the updates of adapters to y in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.kernels import lora_expand, mixed_lora_expand
from fastlora.kernels.launch import kept
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.kernels.modules import Module
from fastlora.kernels.tables import KernelConfig
from fastlora.ops.factors import Factor, present, tables_of
from fastlora.ops.triton.configs import chip_of, config_of
from fastlora.ops.triton.shrink import shrink_at
from fastlora.ops.triton.tables import aligned_blocks, up_rows, up_rows_at

_Tensors = Sequence[torch.Tensor]


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    lora_b: Sequence[Factor],
    lora_bias: Sequence[Factor],
    scaling: torch.Tensor,
) -> None:
    """Add the update of each row's adapter to y ``[M, N]`` in place, given the shrink output s."""
    ups = present(lora_b, 1)
    if not rows:
        expand_one_(y, s, ups[0], scaling)
        return
    ups, biases = aligned_blocks(ups), aligned_blocks(lora_bias)
    up = up_rows(ups, biases, scaling)
    (m, n), r = y.shape, up.largest
    config = config_of("mixed_lora_train_expand", y, m, n, r=r)
    add_rank_rows_([y], s.unsqueeze(0), rows, up, config=config)


@kept
def expand_one_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    """Add the update of one adapter to y in place, in one launch, with products in y's dtype."""
    (m, n), r = y.shape, s.shape[1]
    config = config_of("lora_expand", y, m, n, r=r)
    lora_expand.launch_lora_expand([Module(y, lora_b, scaling)], s, reads_y=True, config=config)


@kept
def add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> None:
    """Add the update of each row's adapter to y in place, in two launches: shrink and expand."""
    found = tables_of(tables, max_rank, factor_dtype)
    s = shrink_at(x, rows, found, slice(index, index + 1))
    (m, k), n = x.shape, y.shape[1]
    config = config_of("mixed_lora_expand", y, m, n, k, max_rank)
    up = up_rows_at(found, index)
    add_rank_rows_([y], s[:, 0], rows, up, config=config, pdl=True)


def add_rank_rows_(
    ys: Sequence[torch.Tensor],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    dropout: DropoutTables | None = None,
) -> None:
    """Add the update of each row's adapter to y of each module, in one launch, given s.

    s is ``[splits, M, R]``, or for several modules ``[splits, G, M, R]`` with tables ``[G, S]``.
    ``pdl`` means that the previous launch is the shrink that computes s.
    """
    mixed_lora_expand.launch_mixed_lora_expand(
        *(ys, s, rows, up),
        config=config,
        pdl=pdl and chip_of(s).has_pdl,
        dropout=dropout,
    )
