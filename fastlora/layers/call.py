"""One layer's forward: what every step of it needs, found when it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.ops.conditions import Conditions
from fastlora.ops.rows import Rows, sort_rows
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


class LayerCall(NamedTuple):
    """A layer that is called outside of a mixed batch: the same adapters act on all rows.

    Attributes:
        layer: Holds the adapters.
        given: ``[..., K]``, the very tensor that the layer was called with.
        x: The same in the dtype that is computed in.
        conditions: What the call runs under.
        names: The adapters that act.
    """

    layer: AdaptedLayer
    given: torch.Tensor
    x: torch.Tensor
    conditions: Conditions
    names: list[str]


class MixedCall(NamedTuple):
    """A layer that is called in a mixed batch: each row has its own adapter.

    Attributes:
        layer: Holds the adapters, or its pool does.
        given, x, conditions: As of a `LayerCall`.
        routing: The batch's; in a graph that is being compiled its ``whole``.
    """

    layer: AdaptedLayer
    given: torch.Tensor
    x: torch.Tensor
    conditions: Conditions
    routing: Routing

    def rows(self, *, host: bool = False) -> Rows:
        """Returns the slots of x's rows; ``host`` says whether the host reads them."""
        x, routing = self.x, self.routing
        m = x.numel() // x.shape[-1]
        if self.conditions.compiling:  # all layers call it alike, and compilers merge them
            return sort_rows(routing.ids, m, len(routing.names), x.device, keeps=False)
        return routing.rows(m, x.device, host=host)
