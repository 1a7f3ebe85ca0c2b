"""Zeros as gradients of adapters that have no rows in a batch.

Where processes share a batch, another one may have rows for them. DDP and FSDP2 then add gradients
up parameter by parameter, and wait for ever, or mix up parameters, where one process has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fastlora.layers.call import MixedCall
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.factors import Base


class ZeroGradients(torch.autograd.Function):
    """Returns y and, in the backward, zeros for parameters that took no part in making it.

    The result shares y's memory, and y itself must not be used again.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters  # for their kind only: nothing reads their values
        # Not a view to autograd, which refuses writes into views that a custom function made.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, *map(torch.zeros_like, ctx.parameters)


def with_absent(call: MixedCall, base: Base, y: torch.Tensor, *, waits: bool) -> torch.Tensor:
    """Returns y, which gives adapters of a layer that have no rows zeros as gradients.

    Args:
        call: The layer's.
        base: The base layer.
        y: What it made, any shape.
        waits: Whether to wait for ids on a GPU. Else all adapters get zeros, to which gradients
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
    return ZeroGradients.apply(y.clone() if y is base.y else y, *absent)


def _parameters_of(layer: AdapterLayer, name: str) -> Iterator[torch.Tensor]:
    """Yields an adapter's parameters on one layer, whatever kinds of them there are."""
    for holder in layer._modules.values():
        if isinstance(holder, nn.ModuleDict) and name in holder:
            yield from holder[name].parameters()
        elif isinstance(holder, nn.ParameterDict) and name in holder:
            yield holder[name]
