"""torch.compile in training: one graph for each set of trainable parameters, then no more.

Small models and cheap backends: what is counted is what Dynamo compiles, which does not depend on
the backend.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.testing import assert_within_budget
from tests.support.compiled import gradients, graph_count
from tests.support.tiny import Gated, with_adapters

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NAMES = ("default", "b")


def adapted(p: float = 0.0) -> LoraModel:
    """The model with two adapters of one rank and two scalings."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["gate", "up", "down"], "lora_dropout": p}
    configs = (LoraConfig(**config, lora_alpha=alpha) for alpha in (8, 3))
    model = with_adapters(Gated(called=False), dict(zip(NAMES, configs, strict=True)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.train()


def check_gradients(mine: list[torch.Tensor], model: LoraModel, x: torch.Tensor) -> None:
    """Compares with the model as it is; in float64 its masks are the same."""
    wide = copy.deepcopy(model).double()
    sides = mine, gradients(model, model, x), gradients(wide, wide, x.double())
    for found, plain, truth in zip(*sides, strict=True):
        assert_within_budget(found, plain, truth)


def test_automatic_dynamic_shapes() -> None:
    """Without being told, a second length makes one dynamic graph, and that is all."""
    model = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (5, 6):
        gradients(compiled, model, torch.randn(2, length, 16))
    assert graph_count() == 2
    for length in range(7, 57):
        gradients(compiled, model, torch.randn(2, length, 16))
    assert graph_count() == 2


@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_other_scalings_compile_nothing(kind: dict[str, Any], training: bool) -> None:
    """A number that is set anew is an input of the graph; 50 of them, in every way to set one."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["gate", "up", "down"], **kind)
    model = get_peft_model(Gated(called=False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = list(model.base_model.model.children())
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(2, 5, 16)

    def results(call: Any, owner: LoraModel, x: torch.Tensor) -> list[torch.Tensor]:
        if training:
            return gradients(call, owner, x)
        with torch.no_grad():
            return [call(x)]

    first = results(compiled, model, x)[0]
    for step in range(50):
        for layer in layers:
            if step % 3 == 0:
                layer.set_scale("default", 0.1 * step)
            elif step % 3 == 1:
                layer.scale_layer(0.9)
            else:
                layer.scaling = {"default": 0.2 * step}
        mine = results(compiled, model, x)
        assert not torch.equal(mine[0], first)
        if step % 10 < 3:
            wide = copy.deepcopy(model).double()
            sides = results(model, model, x), results(wide, wide, x.double())
            for found, plain, truth in zip(mine, *sides, strict=True):
                assert_within_budget(found, plain, truth)
    assert graph_count() == 1


def test_a_scaling_that_is_a_tensor_is_an_input() -> None:
    """What is written into it acts in the compiled graph, which stays."""
    model = adapted()
    scalings = []
    for layer in model.base_model.model.children():
        scalings.append(torch.tensor(2.0))
        layer.scaling["default"] = scalings[-1]
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(2, 5, 16)
    for factor in (0.5, 0.7, 3.0):
        for scaling in scalings:
            scaling.fill_(factor)
        check_gradients(gradients(compiled, model, x), model, x)
    assert graph_count() == 1


def test_an_eager_forward_in_between_changes_no_guard() -> None:
    """Siblings become known by eager training, which compiled code neither reads nor writes."""
    model = adapted()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(2, 5, 16)
    expected = gradients(compiled, model, x)
    for _ in range(3):
        gradients(model, model, x)
    for mine, plain in zip(gradients(compiled, model, x), expected, strict=True):
        assert torch.equal(mine, plain)
    assert graph_count() == 1


def masked(node: Any, mask: Any) -> bool:
    """Whether a node is a dropout mask, or a tensor under one that no product has reduced yet."""
    if node.target is mask:
        return True
    through = ("aten.mul", "aten.view", "aten.reshape", "aten.alias", "aten.clone")
    return str(node.target).startswith(through) and any(
        masked(source, mask) for source in node.all_input_nodes
    )


def test_neither_a_mask_nor_a_dropped_copy_is_saved() -> None:
    """Compiled too, the backward has x and the seeds, and draws its masks again."""
    mask = torch.ops.fastlora.lora_keep.default
    drawn: list[int] = []
    saved: list[Any] = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        drawn.append(sum(node.target is mask for node in graph.graph.nodes))
        return make_boxed_func(graph)

    def partition(joint: Any, inputs: Any, **kwargs: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        saved.extend(forward.graph.output_node().args[0])
        return forward, backward

    backend = aot_autograd(
        fw_compiler=compile_graph, bw_compiler=compile_graph, partition_fn=partition
    )
    model = adapted(0.5)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 9, 16)
    check_gradients(gradients(compiled, model, x), model, x)
    assert drawn == [3, 3]  # one mask a layer in the forward, and one again in the backward
    assert len(saved) > 3
    assert not [node for node in saved if isinstance(node, torch.fx.Node) and masked(node, mask)]
