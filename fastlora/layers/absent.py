"""Zeros as gradients of adapters that have no rows in a batch.

Where processes share a batch, another one may have rows for them. DDP and FSDP2 then add gradients
up parameter by parameter, and wait for ever, or mix up parameters, where one process has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.layers.call import MixedCall
from fastlora.sharding import local

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


def with_absent(call: MixedCall, y: torch.Tensor, *, waits: bool) -> torch.Tensor:
    """Returns y, of any shape, which gives adapters of a layer without rows zeros as gradients.

    ``waits`` says whether to wait for ids on a GPU. Else all adapters get zeros, to which gradients
    are added.
    """
    layer, routing = call.layer, call.routing
    present: set[str] = set()
    if waits or not routing.ids.is_cuda:
        present = {routing.names[slot] for slot in call.rows().present}
    absent = [
        parameter
        for name in layer.lora_A
        if name not in present
        for parameter in _parameters_of(layer, name)
        if parameter.requires_grad
    ]
    if not absent:
        return y
    # No rows of y come from them, so what they get are zeros.
    rows = [local(p)[:0].reshape(0, *y.shape[1:]).to(y.dtype) for p in absent]
    return torch.cat([y, *rows])


def _parameters_of(layer: AdaptedLayer, name: str) -> Iterator[torch.Tensor]:
    """Yields an adapter's parameters on one layer, whatever kinds of them there are."""
    for holder in layer._modules.values():
        if isinstance(holder, nn.ModuleDict) and name in holder:
            yield from holder[name].parameters()
        elif isinstance(holder, nn.ParameterDict) and name in holder:
            yield holder[name]
