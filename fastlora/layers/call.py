"""One layer's forward in a mixed batch: what every step of it needs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.autograd.adapter import autocast_dtype
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.factors import Base
from fastlora.ops.rows import Rows
from fastlora.routing.routing import Routing


class MixedCall(NamedTuple):
    """A layer that is called in a mixed batch.

    Attributes:
        layer: Holds the adapters, or its pool does.
        number: The layer's in its model.
        routing: The batch's; in a graph that is being compiled its ``whole``.
        given: ``[..., K]``, the very tensor that the layer was called with.
        x: The same in the dtype that is computed in.
        autocast: The dtype of autocast, where it is on.
        base: The base layer.
    """

    layer: AdapterLayer
    number: int
    routing: Routing
    given: torch.Tensor
    x: torch.Tensor
    autocast: torch.dtype | None
    base: Base

    @classmethod
    def of(
        cls, layer: AdapterLayer, number: int, routing: Routing, x: torch.Tensor, base: Base
    ) -> MixedCall:
        """Returns the call of a layer with x."""
        autocast = autocast_dtype(x)
        rounded = x if autocast is None else x.to(autocast)
        return cls(layer, number, routing, x, rounded, autocast, base)

    def rows(self, *, host: bool = False) -> Rows:
        """Returns the slots of x's rows; ``host`` says whether the host reads them."""
        x = self.x
        return self.routing.rows(x.numel() // x.shape[-1], x.device, host=host)
