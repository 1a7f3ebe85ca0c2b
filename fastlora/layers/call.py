"""The state of one layer's forward pass, determined once at its beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.ops.conditions import Conditions
from fastlora.ops.rows import Rows, sort_rows
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


class LayerCall(NamedTuple):
    """A layer call outside a mixed batch: the same adapters apply to all rows.

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


class MixedCall(NamedTuple):
    """A layer call in a mixed batch: each row has its own adapter.

    Attributes:
        layer: The layer. It or its pool holds the adapters.
        given, x, conditions: As in `LayerCall`.
        routing: The batch's routing. In a graph that is being compiled, the routing's ``whole``.
    """

    layer: AdaptedLayer
    given: torch.Tensor
    x: torch.Tensor
    conditions: Conditions
    routing: Routing

    def rows(self, *, host: bool = False) -> Rows:
        """Return the slots of x's rows; ``host`` says whether the host reads them."""
        x, routing = self.x, self.routing
        m = x.numel() // x.shape[-1]
        # All layers make the same call, so the compiler can merge the calls.
        if self.conditions.compiling:
            return sort_rows(routing.ids, m, len(routing.names), x.device, keeps=False)
        return routing.rows(m, x.device, host=host)
