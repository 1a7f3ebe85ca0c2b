"""On a GPU: a cached launch computes what a launch by Triton's own launcher computes."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels.lab import Lab, native

if not native():
    pytest.skip("the interpreter keeps nothing", allow_module_level=True)

from fastlora import FastLoraLinear
from fastlora.kernels import launch as launching


def _results(lab: Lab, m: int, drop: bool, seed: int) -> list[torch.Tensor]:
    """y and every gradient of a layer, on tensors drawn from a seed."""
    torch.manual_seed(seed)
    layer = FastLoraLinear(512, 384, r=8, lora_dropout=0.25 * drop, device="cuda").train()
    x = torch.randn(m, 512, device="cuda", requires_grad=True)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    y = layer(x)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("m", [1, 17, 64, 500])
@pytest.mark.parametrize("drop", [False, True])
def test_the_same_bits(lab: Lab, monkeypatch: pytest.MonkeyPatch, m: int, drop: bool) -> None:
    plain = [_results(lab, m, drop, seed) for seed in range(4)]
    monkeypatch.setattr(launching, "_CAN_CACHE", True)
    kept = [_results(lab, m, drop, seed) for seed in range(4)]
    for own, other in zip(kept, plain, strict=True):
        assert all(map(torch.equal, own, other))


def test_a_graph_captures_cached_launches(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_CAN_CACHE", True)
    layer, x = FastLoraLinear(512, 384, r=8, device="cuda"), torch.randn(16, 512, device="cuda")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x))
