"""Layers that are fed by one x, with one adapter each that acts, on the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastlora
from tests.support.kernels.mixed_models import eager, use_impl

NAMES = ("q", "k", "v", "o")


class Attention(nn.Module):
    """Three linears fed by one tensor, of different sizes, and one behind them.

    ``between`` runs before the second is called, with its input, and returns what it is called
    with.
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 48, bias=bias), nn.Linear(32, 16, bias=bias)
        self.v, self.o = nn.Linear(32, 16, bias=bias), nn.Linear(80, 32, bias=bias)
        self.between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        q = self.q(x)
        x = self.between(x)
        return self.o(torch.cat([q, self.k(x), self.v(x)], -1))


def model_of(
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    *,
    train: bool = True,
    known: bool = True,
    **config: Any,
) -> Any:
    """Adapters "default", which acts, and "other" over `Attention`, at random; groups are known.

    Without ``train`` in evaluation, as a forward without gradients has seen it.
    """
    torch.manual_seed(0)
    scalings = {"k": 12, "v": 3}  # of each its own
    made = fastlora.LoraConfig(r=6, target_modules=list(NAMES), alpha_pattern=scalings, **config)
    model = fastlora.get_peft_model(Attention(bias), made)
    model.add_adapter("other", made)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3)
    use_impl(model.to(dtype).train(train), "triton")
    with torch.set_grad_enabled(train):
        for _ in range(2 if known else 0):
            model(torch.randn(2, 32, dtype=dtype))
    return model


def in_pytorch(model: Any, dtype: torch.dtype) -> Any:
    """A copy that computes in PyTorch, in a dtype."""
    return eager(model).to(dtype)


def apart(model: Any) -> Any:
    """A copy on kernels with layers that know no shared-input group."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__dict__.pop("_shared_input_group", None)
    return copied
