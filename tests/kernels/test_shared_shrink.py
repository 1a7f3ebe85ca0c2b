"""Siblings in training over the kernels: one node for their s, one launch for their d_lora_a."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from fastlora import FastLoraLinear, env, fusion_report
from fastlora.ops import backend as ops
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget

NATIVE = torch.cuda.is_available() and not env.triton_interpreted()
DEVICE = "cuda" if NATIVE else "cpu"
if not ops.triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {ops.triton_status(DEVICE)[1]}", allow_module_level=True)

# N, R and dropout of each sibling.
SIBLINGS = [
    ((40, 4, 0.0), (33, 16, 0.0), (16, 3, 0.0)),
    ((40, 4, 0.5), (33, 16, 0.0), (16, 3, 0.25)),
]


def expected(layer: FastLoraLinear, x: torch.Tensor, seed: int | None, p: float) -> torch.Tensor:
    """The layer as anybody would write it, its mask made explicit."""
    dropped = x
    if seed is not None:
        mask = philox_keep_mask(seed, *x.shape, p).to(x.device)
        dropped = torch.where(mask, x, 0.0) / (1.0 - p)
    update = F.linear(
        F.linear(dropped, layer.lora_A["default"].weight), layer.lora_B["default"].weight
    )
    return F.linear(x, layer.weight, layer.bias) + layer.scaling["default"] * update


def as_plain(layers: list[FastLoraLinear], dtype: torch.dtype) -> list[FastLoraLinear]:
    """Copies in another dtype, all of whose weights train."""
    copies = []
    for layer in layers:
        copy = FastLoraLinear(layer.in_features, layer.out_features, r=layer.r["default"])
        copy.load_state_dict(layer.state_dict())
        copy.scaling = dict(layer.scaling)
        copies.append(copy.to(DEVICE, dtype).requires_grad_())
    return copies


def seeds_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list to which every seed drawn from now on is added."""
    seeds: list[int] = []
    draw = ops.draw_seed

    def drawn(*args: Any) -> torch.Tensor:
        seed = draw(*args)
        seeds.append(int(seed))
        return seed

    monkeypatch.setattr(ops, "draw_seed", drawn)
    return seeds


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_siblings_in_a_compiled_graph(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shrink in the forward graph and one d_lora_a in the backward; the masks of layers apart.

    Also of few rows, where the eager model shares too.
    """
    torch._dynamo.reset()
    layers = nn.ModuleList(
        FastLoraLinear(48, n, r=r, lora_dropout=p).to(DEVICE) for n, r, _ in SIBLINGS[0]
    )
    for layer in layers:
        layer.impl = "triton"
        nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 48, device=DEVICE)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in layers], dim=1)

    def results(call: Any, layers: Any, dtype: torch.dtype = x.dtype) -> list[torch.Tensor]:
        torch.manual_seed(3)
        own = x.to(dtype, copy=True).requires_grad_()
        y = call(own)
        factors = [q for name, q in nn.ModuleList(layers).named_parameters() if "lora_" in name]
        return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [own, *factors])]

    def written_out(dtype: torch.dtype) -> list[torch.Tensor]:
        copies = as_plain(list(layers), dtype)
        masks = [(seed, p) for seed in seeds] if p else [(None, p)] * len(copies)
        pairs = list(zip(copies, masks, strict=True))
        return results(
            lambda x: torch.cat([expected(one, x, *mask) for one, mask in pairs], dim=1),
            *(copies, dtype),
        )

    with monkeypatch.context() as patched:
        seeds = seeds_drawn(patched)
        results(forward, layers)
    forward(x)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = results(torch.compile(forward, backend=backend, fullgraph=True), layers)
    counts = [
        [sum(node.target is op for node in graph.graph.nodes) for graph in graphs]
        for op in (
            torch.ops.fastlora.lora_shrink.default,
            torch.ops.fastlora.lora_linear.default,
            torch.ops.fastlora.lora_grad_a.default,
        )
    ]
    assert counts == [[3 if p else 1, 0], [3, 0], [0, 1]]
    linears = [node for node in graphs[0].graph.nodes if "lora_linear" in str(node.target)]
    assert all(node.args[4] is not None for node in linears)  # s, which the shrink made
    sides = compiled, written_out(x.dtype), written_out(torch.float64)
    for mine, plain, exact in zip(*sides, strict=True):
        assert_within_budget(mine, plain, exact)
    assert "3 share x" in fusion_report(layers).rows[0].siblings
