"""A small token model with four adapters, and steps over it, for the tests of `fastlora.train`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR

import fastlora
from fastlora.train import AdapterOptimizers, adapter_parameters, causal_lm_losses, train_adapters
from tests.support.tiny import TwoLayers, randomize, with_adapters

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "target_modules": ["q", "v"]},
    "b": {"r": 4, "target_modules": ["q"], "use_rslora": True},
    "c": {"r": 8, "target_modules": ["q", "v"], "modules_to_save": ["head"]},
    "d": {"r": 4, "target_modules": ["v"], "lora_bias": True, "modules_to_save": ["head"]},
}
NAMES = ["b", None, "a", "c", "b", "d", "a", "__base__"]
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "a": partial(AdamW, lr=1e-2),
    "b": partial(SGD, lr=1e-2, momentum=0.9),
    "c": partial(AdamW, lr=3e-3, weight_decay=0.1),
    "d": partial(Adam, lr=1e-2),
}
SCHEDULERS: dict[str, Callable[..., Any]] = {
    "a": partial(ExponentialLR, gamma=0.9),
    "c": partial(LinearLR, start_factor=0.1, total_iters=5),
}


def build(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    """A token model of 5 labels with every adapter of CONFIGS, factors at random, trainable."""
    torch.manual_seed(0)
    configs = {n: fastlora.LoraConfig(**c, lora_dropout=dropout) for n, c in CONFIGS.items()}
    model = with_adapters(TwoLayers(), configs)
    randomize(model)
    train_adapters(model, list(CONFIGS))
    return model.to(dtype).train()


def batch(
    names: list[str | None], seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, list[str | None]]:
    """Inputs ``[B, 6, 16]``, labels ``[B, 6]`` (some -100) and the names."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(names), 6, 16, generator=generator)
    labels = torch.randint(-1, 5, (len(names), 6), generator=generator)
    return x.to(dtype), labels.masked_fill(labels < 0, -100), names


def losses_of(model: Any, data: Any, seeds: Any = None, tokens: Any = None) -> Any:
    """The losses of one mixed forward."""
    x, labels, names = data
    with fastlora.adapters(model, names, seeds=seeds):
        logits = model(x)
    return causal_lm_losses(logits, labels, names, tokens=tokens)


def only(data: Any, name: str) -> Any:
    """One adapter's rows of a batch, or None."""
    x, labels, names = data
    keep = [i for i, n in enumerate(names) if n == name]
    return (x[keep], labels[keep], [name] * len(keep)) if keep else None


def parameters(model: Any, name: str) -> dict[str, torch.Tensor]:
    """A copy of an adapter's parameters."""
    return {k: p.detach().clone() for k, p in adapter_parameters(model, name).items()}


def gradients(model: Any, name: str) -> dict[str, torch.Tensor | None]:
    """A copy of an adapter's gradients."""
    found = adapter_parameters(model, name)
    return {k: None if p.grad is None else p.grad.clone() for k, p in found.items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two sets of tensors are bit for bit equal."""
    return left.keys() == right.keys() and all(
        right[k] is None if t is None else torch.equal(t, right[k]) for k, t in left.items()
    )


def make(model: Any, **arguments: Any) -> AdapterOptimizers:
    """The optimizers that most tests use."""
    arguments = {"schedulers": SCHEDULERS, "max_grad_norm": {"a": 0.05, "d": 0.1}} | arguments
    return AdapterOptimizers(model, OPTIMIZERS, **arguments)


def uneven_steps(count: int, dtype: torch.dtype) -> list[Any]:
    """Batches of random rows: some without some adapters."""
    generator = torch.Generator().manual_seed(1)
    choice = [torch.randint(0, 5, (4,), generator=generator).tolist() for _ in range(count)]
    names = [[None if i == 4 else "abcd"[i] for i in rows] for rows in choice]
    return [batch(rows, seed, dtype) for seed, rows in enumerate(names)]


def run(model: Any, optimizers: AdapterOptimizers, steps: list[Any]) -> None:
    """Trains, one batch a step."""
    for data in steps:
        losses = losses_of(model, data, optimizers.draw_seeds(data[2]))
        optimizers.backward(losses)
        assert set(optimizers.step().stepped) == set(losses.by_adapter)
        optimizers.zero_grad()
