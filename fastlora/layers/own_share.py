"""`OwnShare`: what one process has of a layer that several processes have parts of.

`fastlora.layers.dora` and `dora_mixed` take it in the layer's place, and see plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlora.sharding import is_sharded


class OwnShare:
    """One process's part of a tensor-parallel layer, for one forward; N and K are of that part.

    It is its own base layer, as a `FastLoraLinear` is.

    Attributes:
        layer: The layer, which keeps what is kept between forwards.
        weight: ``[N, K]``.
        bias: ``[N]`` or None; where outputs are summed over processes, one summand of the bias.
        magnitudes: Name of an adapter with DoRA to its magnitude, ``[N]``.
        squares: The same names to the squared norms of whole rows, ``[N]``.
        scaling, impl, routed_as: The layer's.
        own_seed: Makes the seed of a dropout this process's.
    """

    def __init__(
        self,
        layer: Any,
        bias: torch.Tensor | None,
        own_seed: Callable[[torch.Tensor], torch.Tensor],
        impl: str,
    ) -> None:
        self.layer = layer
        self.weight = local(layer.base_layer.weight)
        self.bias = bias
        self.magnitudes: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self.scaling, self.impl, self.routed_as = layer.scaling, impl, layer.routed_as
        self.own_seed = own_seed

    def get_base_layer(self) -> OwnShare:
        """Returns itself."""
        return self


def local(parameter: Any) -> torch.Tensor:
    """Returns this process's part of a DTensor, in the graph where one is recorded through it.

    What is a part already, a plain tensor, comes back as it is.
    """
    if not is_sharded(parameter):
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        return parameter.to_local()
    with torch.no_grad():
        return parameter.to_local()


def own(parameter: Any, *, summed: bool) -> torch.Tensor:
    """Returns this process's part of a parameter as a plain tensor.

    ``summed`` says that it is the whole parameter, of whose gradient every process has one summand:
    they are added up in the backward.
    """
    if not (summed and torch.is_grad_enabled() and parameter.requires_grad):
        return parameter.to_local()
    from torch.distributed.tensor import Partial

    # The redistribution changes nothing now; its backward turns the sum that is pending into one.
    whole = parameter.redistribute(parameter.device_mesh, parameter.placements)
    return whole.to_local(grad_placements=[Partial()])
