"""Models of several adapters on the kernels, and what a step over a mixed batch gives."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora import adapters
from fastlora.model import adapter_state
from fastlora.model.inject import lora_layers
from fastlora.testing import assert_within_budget
from fastlora.train import train_adapters
from tests.support.tiny import with_adapters

RANKS = (8, 16, 64)
NAMES = ["a3", None, "a0", "a4", "a2", "a0", "a3", "__base__", "a2"]


class Attention(nn.Module):
    """q, k and v fed by one tensor, and o."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., width]`` to ``[..., width]``."""
        return self.o(self.q(x) * self.k(x).tanh().repeat_interleave(2, -1) + self.v(x))


def use_impl(model: Any, impl: str) -> Any:
    """Sets the implementation of every adapted layer; returns the model."""
    for layer in lora_layers(model).values():
        layer.impl = impl
    return model


def eager(model: Any) -> Any:
    """A copy that runs in plain PyTorch."""
    return use_impl(copy.deepcopy(model), "eager")


def build(lab: Any, count: int, dtype: torch.dtype, **changes: Any) -> Any:
    """A model with random adapters ``a0``, ``a1``, ... of mixed ranks, on the kernels."""
    torch.manual_seed(0)
    configs = {}
    for i in range(count):
        fields = {
            "r": RANKS[i % 3],
            "use_rslora": i % 2 == 1,
            "lora_bias": i % 4 == 3,
            "target_modules": ["q", "k", "v", "o"] if i % 5 != 4 else ["q", "o"],
            "init_lora_weights": False,
            **changes,
        }
        configs[f"a{i}"] = fastlora.LoraConfig(**fields)
    model = with_adapters(Attention(), configs, autocast_adapter_dtype=False)
    return use_impl(model.to(lab.device, dtype).eval(), "triton")


def pool_of(model: Any, *targets: str, **limits: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model's base, on the kernels; a pool with its adapters; what the pool loaded."""
    base = copy.deepcopy(model).unload()
    pool = fastlora.AdapterPool(base, target_modules=list(targets), **limits)
    states = {}
    for name, config in model.peft_config.items():
        own = adapter_state.adapter_file_state_dict(model, name, model.state_dict(), False)
        states[name] = {key: tensor.clone() for key, tensor in own.items()}
        pool.load(name, states[name], config=config)
    return use_impl(base, "triton"), pool, states


def run(model: Any, x: torch.Tensor, ids: Any) -> torch.Tensor:
    """A mixed forward without gradients."""
    with torch.no_grad(), adapters(model, ids):
        return model(x)


def trainable(count: int, dtype: torch.dtype, **changes: Any) -> Any:
    """A model on the kernels with every adapter trainable."""
    model = build(SimpleNamespace(device=torch.get_default_device()), count, dtype, **changes)
    train_adapters(model, [f"a{i}" for i in range(count)])
    return model


def step(
    model: Any, x: torch.Tensor, names: Any, seeds: dict[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Output, and the gradients of x and of every parameter that has one."""
    x = x.detach().requires_grad_()
    with adapters(model, names, seeds=seeds):
        y = model(x)
    y.to(torch.promote_types(y.dtype, torch.float32)).pow(2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"y": y.detach(), "dx": x.grad, **found}


def compare(
    found: dict[str, torch.Tensor], near: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    assert set(found) == set(near) == set(exact)
    for name, actual in found.items():
        assert_within_budget(actual, near[name], exact[name], name)
