"""Mixed batches of four adapters on a block of experts, and its output in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastlora
from fastlora import LoraConfig
from tests.support.moe_models import (
    ExpertBlock,
    copy_random_factors,
    file_gradients,
    routed_tokens,
    stacks_of,
)

RANKS = {"a": 4, "b": 1, "c": 16, "d": 3}
ROWS = ["a", None, "b", "c", "d", "a", None, "c"]
EACH = 6  # tokens of a sample


def mixed_block(kind: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """A block with four adapters. The last one adapts one of the two stacks."""
    base = ExpertBlock(kind, dtype, "eager")
    stacks, model = stacks_of(base), None
    for seed, (name, r) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        targets = stacks[:1] if name == "d" else stacks
        config = LoraConfig(
            **{"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout},
            **{"target_modules": [], "target_parameters": targets},
        )
        if model is None:
            model = fastlora.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        copy_random_factors([model], name, seed)
    assert model is not None
    model.set_adapter(list(RANKS))
    return model.train()


def run_rows(
    model: Any,
    rows: list[str | None],
    x: torch.Tensor,
    *routed: torch.Tensor,
    run: Any = None,
    each: int = EACH,
) -> Any:
    """The output of a mixed batch with fixed dropout seeds, and every gradient by adapter."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with fastlora.adapters(model, rows, seeds=dict.fromkeys(RANKS, 11)):
        y = (model if run is None else run)(x.unflatten(0, (len(rows), each)), *routed).flatten(
            0, 1
        )
    y.square().sum().backward()
    factors = {name: file_gradients(model, name) for name in RANKS}
    return y.detach(), x.grad, factors


def batch_inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Inputs of a block for the samples of `ROWS`, with base rows on every expert."""
    inputs = [t.detach() for t in routed_tokens(len(ROWS) * EACH, dtype, idle=None)]
    own = tokens_of([sample for sample, name in enumerate(ROWS) if name is None])
    assert inputs[1][own].unique().tolist() == [0, 1, 2, 3]
    return inputs


def tokens_of(samples: list[int]) -> torch.Tensor:
    """The positions of the tokens of samples."""
    return torch.cat([torch.arange(EACH) + EACH * sample for sample in samples])


def looped(
    model: Any,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    adapter: str | None = "default",
) -> torch.Tensor:
    """The output in plain PyTorch: expert by expert, with LoRA beside each product."""
    layer = model.base_model.model.experts
    base, parts = layer.base_layer, []

    def product(name: str, rows: torch.Tensor, expert: int) -> torch.Tensor:
        weight, inner = getattr(base, name)[expert], layer.inner_layers()[name]
        bias = getattr(base, f"{name}_bias")[expert] if base.has_bias else None
        y = F.linear(rows, weight.t() if base.is_transposed else weight, bias)
        if adapter is None or adapter not in inner.r:
            return y
        down, up = inner.lora_A[adapter].weight, inner.lora_B[adapter].weight
        down = down.view(base.num_experts, -1, down.shape[1])[expert].to(rows.dtype)
        up = up.view(up.shape[0], -1, base.num_experts)[:, :, expert].to(rows.dtype)
        return y + F.linear(F.linear(rows, down), up) * inner.scaling[adapter]

    for expert in range(base.num_experts):
        token, place = torch.where(index == expert)
        y = product("gate_up_proj" if base.has_gate else "up_proj", x[token], expert)
        y = product("down_proj", base._apply_gate(y) if base.has_gate else base.act_fn(y), expert)
        parts.append(torch.zeros_like(x).index_add(0, token, y * weights[token, place, None]))
    return sum(parts[1:], parts[0])
