"""Records of a LoRA layer's call, created once at the beginning of its forward pass.

They have slots, because a forward pass reads a slot several times faster than a field of a
`NamedTuple`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastlora.ops.execution_mode import ExecutionMode
from fastlora.ops.rows import Rows, sort_rows
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


@dataclass(slots=True, eq=False)
class UniformCall:
    """Data for one forward call of a LoRA layer whose input rows all use the same adapters.

    Attributes:
        layer: The layer with the adapters.
        original_x: The tensor that the layer was called with, ``[..., K]``.
        x: ``original_x`` in the dtype of the computation.
        conditions: The conditions of the call (implementation, autocast, tracing).
        names: Names of the adapters to apply.
    """

    layer: BaseLinearWithAdapters
    original_x: torch.Tensor
    x: torch.Tensor
    conditions: ExecutionMode
    names: list[str]


@dataclass(slots=True, eq=False)
class MixedCall:
    """Data for one forward call of a LoRA layer whose input rows may use different adapters.

    The rows are those of a mixed batch. Each row of a mixed batch uses its own adapter or none.

    Attributes:
        layer: The layer. The adapters belong to it or to a pool.
        original_x, x, conditions: As in `UniformCall`.
        routing: The batch's routing. In a graph that is being compiled, the routing's ``whole``.
        dropout_call: Number of the call among the layer's calls with dropout in the block; None
            until the call needs it.
    """

    layer: BaseLinearWithAdapters
    original_x: torch.Tensor
    x: torch.Tensor
    conditions: ExecutionMode
    routing: Routing
    dropout_call: int | None = None

    def dropout_seeds(self, device: torch.device) -> torch.Tensor:
        """Return the dropout seed of each slot for this call, int64 ``[S]`` on the device."""
        number, routing = self.layer.routing_index, self.routing
        if self.dropout_call is None:
            self.dropout_call = routing.count_dropout_call(number)
        return routing.layer_dropout_seeds(number, self.dropout_call, device)

    def sorted_rows(self, *, check_ids_now: bool = False) -> Rows:
        """Return the call's rows, sorted by adapter.

        Set ``check_ids_now`` if the caller reads the sorted rows on the host. The adapter ids of
        the batch are then checked immediately, except in a graph that is being compiled.
        """
        x, routing = self.x, self.routing
        m = x.numel() // x.shape[-1]
        # All layers make the same call, so the compiler can merge the calls.
        if self.conditions.compiling:
            return sort_rows(routing.ids, m, len(routing.names), x.device, cache_pieces=False)
        return routing.sorted_rows(m, x.device, check_ids_now=check_ids_now)
