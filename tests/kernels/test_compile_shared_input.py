"""Groups under torch.compile: one shrink and one d_lora_a pass in each graph, counted there.

Backends that only trace: which operators a graph holds does not depend on who compiles it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoraLinear, env
from fastlora.ops.execution_mode import triton_status
from fastlora.testing import assert_within_budget
from tests.support.compiled import Graphs, gradients, graph_count
from tests.support.sums import yardstick

DEVICE = "cuda" if torch.cuda.is_available() and not env.triton_interpreted() else "cpu"
if not triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {triton_status(DEVICE)[1]}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("fresh_compiler")

K = 24
RANKS = {"q": 4, "k": 3, "v": 5, "o": 2, "gate": 8, "up": 9, "down": 1}


class Block(nn.Module):
    """Attention and a gated layer without what needs no adapter."""

    def __init__(self, p: float = 0.0, **adapter: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, rank in RANKS.items():
            layer = FastLoraLinear(K, K, r=rank, lora_dropout=p, lora_bias=name == "v", **adapter)
            layer.impl = "triton"
            nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
            self.add_module(name, layer.to(DEVICE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 24]`` to ``[..., 24]``."""
        x = x + self.o(torch.tanh(self.q(x)) + self.k(x) * self.v(x))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Launched(Graphs):
    """Graphs whose launches are counted."""

    def launched(self) -> list[tuple[list[int], list[int]]]:
        """How many layers each shrink of a graph serves, and each pass for d_lora_a."""
        return [
            (self._layers(graph, "lora_shrink", 2), self._layers(graph, "lora_grad_a", 1))
            for graph in self.all
        ]

    def _layers(self, graph: torch.fx.GraphModule, name: str, listed: int) -> list[int]:
        operator = getattr(torch.ops.fastlora, name).default
        nodes = [node for node in graph.graph.nodes if node.target is operator]
        return sorted(len(node.args[listed]) for node in nodes)


def check(call: Any, model: nn.Module, x: torch.Tensor) -> None:
    """Compiled values and gradients stay within the budget beside those of layers apart."""
    alone = copy.deepcopy(model)  # which has not seen its siblings
    for layer in alone.modules():
        if isinstance(layer, FastLoraLinear):
            layer.impl = "eager"
    exact = copy.deepcopy(alone).double()
    truth = numbered(gradients(exact, exact, x.double()))
    same = yardstick(lambda: numbered(gradients(alone, alone, x)), truth)
    for name, mine in numbered(gradients(call, model, x)).items():
        assert_within_budget(mine, same[name], truth[name], name)


def numbered(results: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"result {index}": result for index, result in enumerate(results)}


def notes(model: nn.Module) -> list[str]:
    """What the fusion report says of siblings in a graph."""
    rows = fastlora.fusion_report(model).rows
    return [row.shared_input.rpartition("compiled: ")[2] for row in rows]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, K, device=DEVICE)


SHARED = [([2, 3], []), ([], [1, 1, 2, 3])]  # q, k and v; gate and up; o and down alone


@pytest.mark.parametrize("training", [True, False], ids=["trained", "evaluated"])
def test_one_shrink_and_one_gradient_pass_for_grouped_layers(training: bool) -> None:
    """After any eager forward: q/k/v join their passes over x, and so do gate and up."""
    model, x, graphs = Block(), inputs(2, 9), Launched()
    with torch.set_grad_enabled(training):
        model(x)
        model(x)  # down's turn is over when the next forward begins
    check(torch.compile(model, backend=graphs.backend, fullgraph=True), model, x)
    assert graphs.launched() == SHARED
    assert graph_count() == 1
    assert notes(model) == ["3 layers share x"] * 3 + ["none"] + ["2 layers share x"] * 2 + ["none"]


def test_unseen_groups_stay_apart_and_later_forwards_change_no_graph() -> None:
    """Compiled first, the graph has a pass a layer, and keeps it once siblings are known."""
    model, x, graphs = Block(), inputs(2, 9), Launched()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    expected = gradients(compiled, model, x)
    assert graphs.launched() == [([], []), ([], [1] * 7)]
    assert notes(model) == ["not shared: no forward pass ran before torch.compile"] * len(RANKS)
    for _ in range(2):
        gradients(model, model, x)
    for mine, plain in zip(gradients(compiled, model, x), expected, strict=True):
        assert torch.equal(mine, plain)
    assert graph_count() == 1


def frozen(*layers: nn.Module) -> None:
    """Freezes layers."""
    for layer in layers:
        layer.requires_grad_(False)


def hooked(*layers: Any) -> None:
    """Hooks into a factor of layers, which PyTorch then computes."""
    for layer in layers:
        layer.impl = "auto"
        layer.lora_A["default"].register_forward_hook(lambda *_: None)


def dora(*layers: Any) -> None:
    """Makes layers use DoRA."""
    for layer in layers:
        r = layer.r["default"]
        layer.delete_adapter("default")
        layer.add_adapter("default", r=r, use_dora=True)
        layer.set_adapter("default")
        layer.to(DEVICE)


APART = {
    "frozen": (frozen, "a layer is frozen"),
    "hooked": (hooked, "the layers have different implementations"),
    "dora": (dora, "a layer uses DoRA"),
}


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("change", APART)
def test_grouped_layers_that_cannot_share(change: str) -> None:
    """Two that are left share; one that is left does not, and the report says why."""
    alter, why = APART[change]
    for names, expected, note in (
        (["v"], [2, 2], "3 layers share x"),
        (["k", "v"], [2], f"3 layers, not shared: in its group, {why}"),
    ):
        model, x, graphs = Block(), inputs(2, 9), Launched()
        model(x)
        alter(*(getattr(model, name) for name in names))
        check(torch.compile(model, backend=graphs.backend, fullgraph=True), model, x)
        assert [n for n in graphs.launched()[0][0] if n > 1] == expected
        assert notes(model)[0].startswith(note)


def test_checkpoints_within_the_graph() -> None:
    """The partitioner repeats operators, not our functions: sharing is as safe as without."""
    model, x, graphs = Block(), inputs(2, 9), Launched()
    model(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)

    check(torch.compile(call, backend=graphs.backend, fullgraph=True), model, x)
    forward, backward = graphs.launched()
    assert forward[0] == [2, 3]
    assert 3 in backward[0]
    assert graph_count() == 1


def test_blocks_that_are_compiled_one_by_one() -> None:
    """Equal blocks have one graph. One whose siblings came in another order has its own."""
    graphs, x = Launched(), inputs(2, 9)
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        turned = block is blocks[2]
        order = (block.v, block.k, block.q) if turned else (block.q, block.k, block.v)
        for layer in order:
            layer(x)
        block(inputs(2, 9))  # which makes their order known
        block.compile(backend=graphs.backend, fullgraph=True)
        apart = copy.deepcopy(block)
        apart._compiled_call_impl = None
        same, mine = gradients(apart, apart, x), gradients(block, block, x)
        for one, other in zip(mine, same, strict=True):
            assert (one - other).norm() <= 32 * torch.finfo(x.dtype).eps * other.norm()
    assert graph_count() == 2
    assert graphs.launched() == SHARED * 2


def test_a_write_between_grouped_layers_is_seen() -> None:
    """x changed in place after q has used it: k and v get what they are called with."""
    model, x = Block(), inputs(9)
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
    model, x = Block(), inputs(9)
    model(x)
    for layer in (model.k, model.v):
        check(torch.compile(layer, backend="eager", fullgraph=True), layer, x)
    check(model, model, x)
