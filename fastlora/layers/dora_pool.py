"""DoRA's rows over a pool, scaled by an operator that finds the scales where tables say they lie.

So it is the same in a compiled graph, in a captured one and without: what changes with the batch,
a load or a hot swap are the contents of tensors. A pool makes the scales (`fastlora.pool.scales`).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops import schema as ops
from fastlora.ops.rows import Rows
from fastlora.ops.triton.configs import rows_at
from fastlora.routing.routing import Routing


def scale_in_graph_(layer: Any, y: torch.Tensor, batch: Routing, rows: Rows) -> torch.Tensor:
    """Scales DoRA's rows of ``y [..., N]`` in place, in a graph that is being compiled.

    Nothing where the pool has not seen such an adapter: its first one compiles a graph anew.
    """
    tables: Any = batch.source.tables
    if tables.scale_address is None:
        return y
    flat = y.view(-1, y.shape[-1])
    _scale_(layer, flat, tables, rows, ops.resolve_impl(layer.impl, y))
    return y


def scale_rows_(layer: Any, y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Scales DoRA's rows of ``y [..., N]`` in place on the Triton kernels."""
    flat = y.view(-1, y.shape[-1])
    _scale_(layer, flat, routing.source.tables, routing.rows(flat.shape[0], y.device), "triton")
    return y


def _scale_(layer: Any, flat: torch.Tensor, tables: Any, rows: Rows, impl: str) -> None:
    own = rows_at(rows) if impl == "triton" else rows.tensors()
    torch.ops.fastlora.lora_scale_(
        flat, _bias_of(layer), own, tables.scale_address, layer.table_row, impl
    )


def _bias_of(layer: Any) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(layer.get_base_layer(), "bias", None)
    return bias
