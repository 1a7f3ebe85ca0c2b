"""What tests of compiled models count and compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.support.tiny import trainable


def graph_count() -> int:
    """How many graphs Dynamo has compiled, and fails if one was broken."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def gradients(call: Any, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x and of every trainable parameter, from one seed."""
    torch.manual_seed(4)
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).mean(), [x, *trainable(model)])]
