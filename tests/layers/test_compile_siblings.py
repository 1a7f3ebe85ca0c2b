"""Siblings under torch.compile: one shrink and one d_lora_a pass in each graph, counted there.

Backends that only trace: which products a graph holds does not depend on who compiles it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoraLinear
from fastlora.testing import assert_within_budget
from tests.support.compiled import gradients, graph_count

pytestmark = pytest.mark.usefixtures("fresh_compiler")

K = 24
# Ranks whose sums, of q/k, q/k/v and gate/up, are no other dimension here.
RANKS = {"q": 4, "k": 3, "v": 5, "o": 2, "gate": 8, "up": 9, "down": 1}
QK, QKV, GATED = 7, 12, 17


class Block(nn.Module):
    """Attention and a gated layer without what needs no adapter."""

    def __init__(self, p: float = 0.0, **adapter: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, rank in RANKS.items():
            layer = FastLoraLinear(K, K, r=rank, lora_dropout=p, lora_bias=name == "v", **adapter)
            nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 24]`` to ``[..., 24]``."""
        x = x + self.o(torch.tanh(self.q(x)) + self.k(x) * self.v(x))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Graphs:
    """A backend that keeps the forward and the backward graphs."""

    def __init__(self) -> None:
        self.all: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep,
            bw_compiler=self._keep,
            partition_fn=min_cut_rematerialization_partition,
        )

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.all.append(graph)
        return make_boxed_func(graph)

    def products(self, size: int) -> list[int]:
        """How many products in each graph have a dimension of this size in their result."""
        return [
            sum(
                node.target is torch.ops.aten.mm.default and size in node.meta["val"].shape
                for node in graph.graph.nodes
            )
            for graph in self.all
        ]


def check(call: Any, model: nn.Module, x: torch.Tensor) -> None:
    """Compiled values and gradients stay within the budget beside those of layers apart."""
    alone = copy.deepcopy(model)  # which has not seen its siblings
    same, exact = gradients(alone, alone, x), copy.deepcopy(alone).double()
    truth = gradients(exact, exact, x.double())
    for index, (mine, plain, true) in enumerate(
        zip(gradients(call, model, x), same, truth, strict=True)
    ):
        assert_within_budget(mine, plain, true, f"result {index}")


def notes(model: nn.Module) -> list[str]:
    """What the fusion report says of siblings."""
    return [row.siblings for row in fastlora.fusion_report(model).rows]


@pytest.mark.parametrize("training", [True, False], ids=["trained", "evaluated"])
def test_one_shrink_and_one_gradient_pass_for_siblings(training: bool) -> None:
    """After any eager forward: q/k/v join their products with x, and so do gate and up."""
    model, x, graphs = Block(), torch.randn(2, 9, K), Graphs()
    with torch.set_grad_enabled(training):
        model(x)
        model(x)  # down's turn is over when the next forward begins
    check(torch.compile(model, backend=graphs.backend, fullgraph=True), model, x)
    forward_backward = [1, 1]
    assert graphs.products(QKV) == graphs.products(GATED) == forward_backward
    for name in ("q", "k", "v", "gate", "up"):
        assert graphs.products(RANKS[name])[0] == 0
    # In the backward what is left of a rank is ds and d_lora_b of the layer.
    assert [graphs.products(RANKS[name])[1] for name in ("q", "k", "v", "gate", "up")] == [2] * 5
    assert graph_count() == 1
    last = [note.rpartition("compiled: ")[2] for note in notes(model)]
    assert last == ["3 share x"] * 3 + ["none"] + ["2 share x"] * 2 + ["none"]


def test_unseen_siblings_stay_apart_and_later_forwards_change_no_graph() -> None:
    """Compiled first, the graph has a product a layer, and keeps it once siblings are known."""
    model, x, graphs = Block(), torch.randn(2, 9, K), Graphs()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    expected = gradients(compiled, model, x)
    assert graphs.products(QKV) == [0, 0]
    assert notes(model) == [
        "no training forward seen yet; compiled: not shared: no forward was seen before "
        "torch.compile"
    ] * len(RANKS)
    for _ in range(2):
        gradients(model, model, x)
    for mine, plain in zip(gradients(compiled, model, x), expected, strict=True):
        assert torch.equal(mine, plain)
    assert graph_count() == 1


def frozen(*layers: nn.Module) -> None:
    """Freezes layers."""
    for layer in layers:
        layer.requires_grad_(False)


def dropping(*layers: Any) -> None:
    """Gives layers a dropout that acts."""
    for layer in layers:
        layer.lora_dropout["default"] = nn.Dropout(0.5)


def hooked(*layers: Any) -> None:
    """Hooks into a factor of layers."""
    for layer in layers:
        layer.lora_A["default"].register_forward_hook(lambda *_: None)


def dora(*layers: Any) -> None:
    """Makes layers use DoRA."""
    for layer in layers:
        r = layer.r["default"]
        layer.delete_adapter("default")
        layer.add_adapter("default", r=r, use_dora=True)
        layer.set_adapter("default")


APART = {
    "frozen": (frozen, "one of them is frozen"),
    "dropout": (dropping, "PyTorch has nothing to share under dropout"),
    "hooked": (hooked, "one of them has a factor or dropout that is hooked"),
    "dora": (dora, "one of them is DoRA"),
}


@pytest.mark.parametrize("change", APART)
def test_siblings_that_cannot_share(change: str) -> None:
    """Two that are left share; one that is left does not, and the report says why."""
    alter, why = APART[change]
    for names, expected, note in (
        (["v"], [1, 1], "3 share x"),
        (["k", "v"], [0, 0], f"3, not shared: of its siblings, {why}"),
    ):
        model, x, graphs = Block(), torch.randn(2, 9, K), Graphs()
        model(x)
        alter(*(getattr(model, name) for name in names))
        check(torch.compile(model, backend=graphs.backend, fullgraph=True), model, x)
        assert graphs.products(QK) == expected
        assert graphs.products(QKV) == [0, 0]
        assert notes(model)[0].rpartition("compiled: ")[2].startswith(note)


def test_checkpoints_within_the_graph() -> None:
    """The partitioner repeats products, not our functions: sharing is as safe as without."""
    model, x, graphs = Block(), torch.randn(2, 9, K), Graphs()
    model(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)

    check(torch.compile(call, backend=graphs.backend, fullgraph=True), model, x)
    assert graphs.products(QKV)[0] == 1
    assert graphs.products(QKV)[1] >= 1
    assert graph_count() == 1


def test_blocks_that_are_compiled_one_by_one() -> None:
    """Equal blocks have one graph. One whose siblings came in another order has its own."""
    graphs, x = Graphs(), torch.randn(2, 9, K)
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        turned = block is blocks[2]
        order = (block.v, block.k, block.q) if turned else (block.q, block.k, block.v)
        for layer in order:
            layer(x)
        block(torch.randn(2, 9, K))  # which makes their order known
        block.compile(backend=graphs.backend, fullgraph=True)
        apart = copy.deepcopy(block)
        apart._compiled_call_impl = None
        same, mine = gradients(apart, apart, x), gradients(block, block, x)
        for one, other in zip(mine, same, strict=True):
            assert (one - other).norm() <= 32 * torch.finfo(x.dtype).eps * other.norm()
    assert graph_count() == 2
    assert graphs.products(QKV) == [1, 1] * 2


def test_a_write_between_siblings_is_seen() -> None:
    """x changed in place after q has used it: k and v get what they are called with."""
    model, x = Block(), torch.randn(9, K)
    model(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        with torch.no_grad():
            first = model.q(x)
        y = model.k(x)
        x.add_(1.0)
        return first + y.detach() + model.v(x)

    expected = call(x)
    mine = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert (mine - expected).norm() <= 16 * torch.finfo(x.dtype).eps * expected.norm()


def test_one_layer_alone() -> None:
    """A graph with one of three siblings is right, and leaves nothing for an eager call."""
    model, x = Block(), torch.randn(9, K)
    model(x)
    for layer in (model.k, model.v):
        check(torch.compile(layer, backend="eager", fullgraph=True), layer, x)
    check(model, model, x)
