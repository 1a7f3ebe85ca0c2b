"""vLLM's LoRA layers in compiled code: one graph serves every mix and every adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from vllm.model_executor.layers.linear import RowParallelLinear

from fastlora.ops.slots import BatchRows
from tests.engine import vllm_layers
from tests.engine.vllm_layers import MIX, Case, K

pytestmark = pytest.mark.usefixtures("one_process")


class LlamaBlock(nn.Module):
    """A decoder layer with vLLM's LoRA layers. Its attention has no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.cases = {
            "qkv": _case("MergedQKVParallelLinearWithLoRA"),
            "o": _case("RowParallelLinearWithLoRA", (K,)),
            "gate_up": _case("MergedColumnParallelLinearWithLoRA"),
            "down": _case("RowParallelLinearWithLoRA", (K,), 20),
        }
        self.layers = nn.ModuleDict({name: case.layer for name, case in self.cases.items()})
        self.norms = nn.ModuleList([nn.RMSNorm(K), nn.RMSNorm(K)])

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        made = self.layers[name](x)
        return made[0] if isinstance(made, tuple) else made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[M, K]`` to ``[M, K]``."""
        q, k, v = self._linear("qkv", self.norms[0](x)).split((24, 8, 8), 1)
        q = q.view(-1, 4, 6).transpose(0, 1)
        # Two groups of query heads share a key head of 4 of their 6 elements.
        k, v = (each.view(-1, 2, 4).transpose(0, 1).repeat_interleave(2, 0) for each in (k, v))
        k, v = F.pad(k, (0, 2)), F.pad(v, (0, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._linear("o", mixed.transpose(0, 1).reshape(-1, K))
        gate, up = self._linear("gate_up", self.norms[1](x)).chunk(2, 1)
        return x + self._linear("down", F.silu(gate) * up)


def _case(name: str, sizes: tuple[int, ...] = (), k: int = K) -> Case:
    """A layer with adapters. Its weights are small, so that the block's outputs are."""
    if sizes:
        base: Any = RowParallelLinear(k, *sizes, bias=False, params_dtype=torch.float32)
    else:
        make, sizes = vllm_layers.LINEAR[name]
        base = make(torch.float32)
    return vllm_layers.loaded_case(name, base, sizes, strength=0.2)


@pytest.mark.parametrize("sorted_ahead", [False, True])
def test_one_graph_serves_two_mixes_and_a_reloaded_adapter(
    fresh_compiler: Any, sorted_ahead: bool
) -> None:
    """The graph sorts the rows, or reads buffers for the largest batch, as captured graphs do."""
    block, wrapper = LlamaBlock(), vllm_layers.wrapper()
    if sorted_ahead:
        wrapper._tokens = BatchRows(wrapper._token_lora_indices, vllm_layers.SLOTS, True)
    for layer in block.layers.values():
        layer.set_mapping(wrapper)
    counter = CompileCounterWithBackend("aot_eager" if sorted_ahead else "inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    x, results = torch.randn(len(MIX), K), []

    def check(ids: tuple[int, ...]) -> None:
        vllm_layers.start_batch(wrapper, ids)
        with torch.no_grad():
            eager, own = block(x), compiled(x)
        # Both sum in fp32, in different orders, through four layers.
        budget = 16 * torch.finfo(x.dtype).eps * eager.abs().max().item()
        torch.testing.assert_close(own, eager, rtol=0.0, atol=budget)
        results.append(own)

    check(MIX)
    check(MIX[::-1])
    check((0,) * len(MIX))
    for case in block.cases.values():
        vllm_layers.set_adapter(case, 0, 11)
        case.layer.reset_lora(3)
        case.factors.pop(3)
    check(MIX)
    assert counter.frame_count == 1
    for index, own in enumerate(results):
        for other in results[:index]:
            assert (own - other).abs().max() > 0.01
