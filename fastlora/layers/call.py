"""Records of a LoRA layer's call, created once at the beginning of its forward pass.

They have slots, because a forward pass reads a slot several times faster than a field of a
`NamedTuple`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastlora.ops.conditions import Conditions
from fastlora.ops.rows import Rows, sort_rows
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


@dataclass(slots=True, eq=False)
class LayerCall:
    """The call of a LoRA layer outside mixed batches, where the same adapters apply to all rows.

    Attributes:
        layer: The layer with the adapters.
        given: The tensor that the layer was called with, ``[..., K]``.
        x: ``given`` in the dtype of the computation.
        conditions: The conditions of the call (implementation, autocast, tracing).
        names: Names of the adapters to apply.
    """

    layer: AdaptedLayer
    given: torch.Tensor
    x: torch.Tensor
    conditions: Conditions
    names: list[str]


@dataclass(slots=True, eq=False)
class MixedCall:
    """The call of a LoRA layer in a mixed batch, where each row has its own adapter or none.

    Attributes:
        layer: The layer. The adapters belong to it or to a pool.
        given, x, conditions: As in `LayerCall`.
        routing: The batch's routing. In a graph that is being compiled, the routing's ``whole``.
    """

    layer: AdaptedLayer
    given: torch.Tensor
    x: torch.Tensor
    conditions: Conditions
    routing: Routing

    def rows(self, *, host: bool = False) -> Rows:
        """Return the sorted `Rows` of x.

        ``host`` tells whether the host reads their slots.
        """
        x, routing = self.x, self.routing
        m = x.numel() // x.shape[-1]
        # All layers make the same call, so the compiler can merge the calls.
        if self.conditions.compiling:
            return sort_rows(routing.ids, m, len(routing.names), x.device, keeps=False)
        return routing.rows(m, x.device, host=host)
