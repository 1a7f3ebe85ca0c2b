"""Gradients of zeros for the parameters of adapters that have no rows in a batch.

In distributed training, another process may have rows for these adapters. DDP and FSDP2 reduce
gradients parameter by parameter. If a parameter has no gradient in one process, they wait forever
or reduce the gradients of different parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.layers.call import MixedCall
from fastlora.sharding import local_shard

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


def attach_unused_parameters(call: MixedCall, y: torch.Tensor, *, may_sync: bool) -> torch.Tensor:
    """Attach the parameters of unused adapters to the autograd graph of y, and return y.

    An adapter is unused if no row of the batch selects it. In the backward pass, these parameters
    get gradients of zeros. y has any shape. If ``may_sync`` is not set and the ids are on a GPU,
    the parameters of all adapters are added, to avoid waiting for the ids. Zeros are then added to
    the other gradients.
    """
    layer, routing = call.layer, call.routing
    present: set[str] = set()
    if may_sync or not routing.ids.is_cuda:
        present = {routing.names[slot] for slot in call.sorted_rows().used_slots}
    unused = [
        parameter
        for name in layer.lora_A
        if name not in present
        for parameter in _adapter_parameters(layer, name)
        if parameter.requires_grad
    ]
    if not unused:
        return y
    # Every slice is empty, so the parameters get zeros as gradients.
    rows = [local_shard(p)[:0].reshape(0, *y.shape[1:]).to(y.dtype) for p in unused]
    return torch.cat([y, *rows])


def _adapter_parameters(layer: BaseLinearWithAdapters, name: str) -> Iterator[torch.Tensor]:
    """Yield the parameters of an adapter on one layer."""
    for holder in layer._modules.values():
        if isinstance(holder, nn.ModuleDict) and name in holder:
            yield from holder[name].parameters()
        elif isinstance(holder, nn.ParameterDict) and name in holder:
            yield holder[name]
