"""Adapters on stacks of experts' weights: against PEFT, in mixed batches, merged, and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlora
from fastlora import LoraConfig
from fastlora.testing import assert_within_budget, run_with_largest_error
from tests.support.moe_models import (
    ExpertBlock,
    copy_random_factors,
    file_gradients,
    file_parameters,
    routed_tokens,
    stacks_of,
)
from tests.support.peft_twins import peft

# Transposed or not, with and without a gate, a bias, and a gate of their own.
KINDS = ["qwen3_moe", "gpt_oss", "nemotron_h"]
DOUBLE = torch.float64


def block(
    kind: str,
    dtype: torch.dtype = DOUBLE,
    library: Any = fastlora,
    implementation: str = "eager",
    wide: bool = True,
    **config: Any,
) -> Any:
    """A block of experts with an adapter, the same in both libraries."""
    base = ExpertBlock(kind, dtype, implementation)
    torch.manual_seed(1)
    config = {"target_parameters": stacks_of(base), "target_modules": [], **config}
    settings = library.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})
    model = library.get_peft_model(base, settings, autocast_adapter_dtype=wide)
    copy_random_factors([model])
    return model


def looped(model: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The output in plain PyTorch: expert by expert, with LoRA beside each product."""
    layer = model.base_model.model.experts
    base, parts = layer.base_layer, []

    def product(name: str, rows: torch.Tensor, expert: int) -> torch.Tensor:
        weight, inner = getattr(base, name)[expert], layer.inner_layers()[name]
        bias = getattr(base, f"{name}_bias")[expert] if base.has_bias else None
        down, up = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        down = down.view(base.num_experts, -1, down.shape[1])[expert].to(rows.dtype)
        up = up.view(up.shape[0], -1, base.num_experts)[:, :, expert].to(rows.dtype)
        y = F.linear(rows, weight.t() if base.is_transposed else weight, bias)
        return y + F.linear(F.linear(rows, down), up) * inner.scaling["default"]

    for expert in range(base.num_experts):
        token, place = torch.where(index == expert)
        y = product("gate_up_proj" if base.has_gate else "up_proj", x[token], expert)
        y = product("down_proj", base._apply_gate(y) if base.has_gate else base.act_fn(y), expert)
        parts.append(torch.zeros_like(x).index_add(0, token, y * weights[token, place, None]))
    return sum(parts[1:], parts[0])


def step(model: Any, tokens: int = 24, run: Any = None) -> dict[str, torch.Tensor]:
    """The output and every gradient of a step."""
    model.zero_grad()
    dtype = next(p for n, p in model.named_parameters() if "experts" in n and "lora" not in n).dtype
    x, index, weights = routed_tokens(tokens, dtype)
    y = model(x, index, weights) if run is None else run(model, x, index, weights)
    generator = torch.Generator().manual_seed(4)
    (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad, **file_gradients(model)}
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def as_truth(model: Any) -> Any:
    """The same model in float64."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_values_and_every_gradient_are_within_the_budget(
    kind: str, implementation: str, dtype: torch.dtype, wide: bool
) -> None:
    if dtype == torch.float32 and not wide:
        pytest.skip("the factors are fp32 in both cases")
    ours = block(kind, dtype, implementation=implementation, wide=wide)
    theirs = block(kind, dtype, peft, wide=wide)
    for key, factor in file_parameters(ours).items():
        assert torch.equal(factor, file_parameters(theirs)[key]), key
        assert factor.dtype == (torch.float32 if wide else dtype)
    truth, runs, found = step(as_truth(theirs)), [step(theirs)], step(ours)
    if dtype.itemsize == 2:  # PEFT rounds the sum of weight and update, and not the update alone.
        runs.append(step(ours, run=looped))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        same = run_with_largest_error([run[name] for run in runs], truth[name])
        assert value.dtype == same.dtype
        assert_within_budget(value, same, truth[name], name)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_same_seed_gives_pefts_initial_values(init: Any) -> None:
    ours, theirs = (
        library.get_peft_model(base, config)
        for library in (fastlora, peft)
        for base in [ExpertBlock("gpt_oss", torch.float32)]
        for config in [
            library.LoraConfig(
                r=3,
                target_modules=[],
                target_parameters=["experts.down_proj", "experts.gate_up_proj"],
                init_lora_weights=init,
            )
        ]
        if torch.manual_seed(5)
    )
    found, expected = file_parameters(ours), file_parameters(theirs)
    assert list(found) and found.keys() == expected.keys()
    for key, factor in found.items():
        assert torch.equal(factor, expected[key]), key
