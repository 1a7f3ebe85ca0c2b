"""DoRA's rows over a pool, scaled by an operator that finds the scales where tables say they lie.

So it is the same in a compiled graph, in a captured one and without: what changes with the batch,
a load or a hot swap are the contents of tensors. A pool makes the scales (`fastlora.pool.scales`).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.autograd import mixed_graph_ops
from fastlora.ops import mixed_dora_scale_ops, mixed_ops  # noqa: F401 - registers operators
from fastlora.ops import schema as ops
from fastlora.ops.graph_routing import PoolGraphRouting
from fastlora.ops.row_groups import RowGroups
from fastlora.routing.routing import KernelRouting


def scale_in_graph_(layer: Any, y: torch.Tensor, batch: PoolGraphRouting) -> torch.Tensor:
    """Scales DoRA's rows of ``y [..., N]`` in place, in a graph that is being compiled.

    Nothing where the pool has not seen such an adapter: its first one compiles a graph anew.
    """
    tables = batch.tables
    if not tables.uses_dora:
        return y
    flat = y.view(-1, y.shape[-1])
    if ops.resolve_impl(layer.impl, y) == "triton":
        groups = mixed_graph_ops.groups_in_graph(batch.columns, flat, tables.rank.shape[1])
        _scale_(layer, flat, tables, groups)
    else:
        torch.ops.fastlora.mixed_dora_pool_scale_(
            flat, _bias_of(layer), batch.columns, tables.scale_address, layer.table_row
        )
    return y


def scale_rows_(layer: Any, y: torch.Tensor, kernels: KernelRouting) -> torch.Tensor:
    """Scales DoRA's rows of ``y [..., N]`` in place on the Triton kernels."""
    flat = y.view(-1, y.shape[-1])
    _scale_(layer, flat, kernels.tables, kernels.groups(flat.shape[0], y.device))
    return y


def _scale_(layer: Any, flat: torch.Tensor, tables: Any, groups: RowGroups) -> None:
    torch.ops.fastlora.mixed_dora_scale_(
        flat,
        _bias_of(layer),
        groups.order,
        groups.segment_of,
        groups.segment_slot,
        mixed_ops.pieces_of(groups),
        tables.scale_address,
        layer.table_row,
    )


def _bias_of(layer: Any) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(layer.get_base_layer(), "bias", None)
    return bias
