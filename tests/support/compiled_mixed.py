"""A model with four adapters of different kinds, to compile in mixed batches."""

from __future__ import annotations

import copy
from typing import Any

import torch

import fastlora
from fastlora import LoraConfig, LoraModel
from fastlora.testing import assert_within_budget
from tests.support.tiny import Gated, trainable, with_adapters

K = 16
NAMES = ("a", "b", "c", "d")
# Ranks, alphas and targets of their own; one has a bias.
KINDS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["gate", "up", "down"]},
    "b": {"r": 3, "lora_alpha": 2, "target_modules": ["gate", "down"]},
    "c": {"r": 8, "use_rslora": True, "target_modules": ["up", "down"]},
    "d": {"r": 1, "lora_bias": True, "target_modules": ["gate", "up", "down"]},
}
SEEDS = dict(zip((*NAMES, "e", "f"), (11, 22, 33, 44, 55, 66), strict=True))


def adapted(p: float = 0.0) -> LoraModel:
    """The model with four adapters, all of which train."""
    torch.manual_seed(0)
    configs = {name: LoraConfig(**KINDS[name], lora_dropout=p) for name in NAMES}
    model = with_adapters(Gated(K), configs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_()
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.train()


def results(call: Any, model: Any, x: torch.Tensor, ids: Any) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the factors; zeros where there is none."""
    x = x.detach().requires_grad_(torch.is_grad_enabled())
    with fastlora.adapters(model, ids, seeds=SEEDS):
        y = call(x)
    if not torch.is_grad_enabled():
        return [y]
    wanted = [x, *trainable(model)]
    found = torch.autograd.grad(y.pow(2).mean(), wanted, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


def check(mine: list[torch.Tensor], model: LoraModel, x: torch.Tensor, ids: Any) -> None:
    """As near to float64 as the model that is not compiled."""
    exact = copy.deepcopy(model).double()
    pairs = zip(results(model, model, x, ids), results(exact, exact, x.double(), ids), strict=True)
    for index, (one, (plain, truth)) in enumerate(zip(mine, pairs, strict=True)):
        assert_within_budget(one, plain, truth, f"result {index}")
