"""What tests of compiled models count and compare."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
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


class Graphs:
    """A backend that keeps forward and backward graphs, and what the forwards save."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.saved: list[Any] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep, bw_compiler=self._keep, partition_fn=self._partition
        )

    def _keep(self, graph: Any, inputs: Any) -> Any:
        self.all.append(graph)
        return make_boxed_func(graph)

    def _partition(self, joint: Any, inputs: Any, **kwargs: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        self.saved.extend(forward.graph.output_node().args[0])
        return forward, backward

    def count(self, operator: Any) -> list[int]:
        """How often each graph calls an operator."""
        return [sum(node.target is operator for node in g.graph.nodes) for g in self.all]
